"""Everything that vqkv raises on purpose; a message says where, what was given, what would do."""


class VQKVError(Exception):
    """Base of all errors that a caller of vqkv can mend."""


class SchemeError(VQKVError, ValueError):
    """A scheme file or config that cannot work."""


class RegistryError(VQKVError, LookupError):
    """A name that no registry knows, that two plugins claim, or whose plugin is broken."""


class NotFittedError(VQKVError, RuntimeError):
    """Something that has to learn from data was used before `fit`."""


class StateError(VQKVError, ValueError):
    """Tensors of a wrong shape or type, or with NaN or infinity in them."""


class KernelError(VQKVError, RuntimeError):
    """No kernel can do what was asked, or the one asked for refuses."""


class ArtefactError(VQKVError, RuntimeError):
    """A saved compressor that is damaged, incomplete, or made for another model."""


class ModelError(VQKVError, RuntimeError):
    """A model that cannot be found, or that vqkv cannot host."""


#: What the same scheme on the same model and states would end in again.
REFUSALS = (ModelError, SchemeError, StateError)


class CacheError(VQKVError, RuntimeError):
    """A cache used in a way that would give wrong results."""


class TextError(VQKVError, ValueError):
    """A text that is empty, unreadable, or too short for what was asked."""


class EvaluationError(VQKVError, RuntimeError):
    """An evaluation whose figures could not be trusted."""
