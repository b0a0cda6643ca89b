"""The compressed cache inside transformers. All contact with its cache interface is in here."""

from vqkv.cache.attachment import Attachment, attach
from vqkv.cache.before_use import BeforeUseCache
from vqkv.cache.vqcache import VQCache

__all__ = ["Attachment", "BeforeUseCache", "VQCache", "attach"]
