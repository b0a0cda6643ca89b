"""Names to classes: what lets a scheme file name a method, built in or from a plugin.

A config never holds an import path. Built-in members are listed beside their base class; a
plugin's come from the entry-point group that the registry is named after. Nothing is imported
before its name is asked for, so one broken plugin leaves the others working.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue, models_json_schema
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from vqkv.errors import RegistryError, SchemeError

T = TypeVar("T")


class Config(BaseModel):
    """Settings of one component: frozen, hashable, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_near_misses(cls, given: Any) -> Any:
        """Refuse unknown fields here, where their near misses are known."""
        if not isinstance(given, Mapping):
            return given
        unknown = [
            InitErrorDetails(
                type=PydanticCustomError(
                    "unknown_field",
                    "unknown field (given {value}).{hint}",
                    {"value": short(value), "hint": did_you_mean(str(name), [*cls.model_fields])},
                ),
                loc=(str(name),),
                input=value,
            )
            for name, value in given.items()
            if name not in cls.model_fields
        ]
        if unknown:
            raise ValidationError.from_exception_data(cls.__name__, unknown)
        return given


class Component:
    """What a scheme names. The constructor stores settings and does no more.

    Learned state lives in attributes that end in `_` and appears when `fit` has run.

    Raises:
        SchemeError: settings that its config refuses, or both a config and settings.
    """

    Config: ClassVar[type[Config]]

    def __init__(self, config: BaseModel | None = None, **settings: Any) -> None:
        name = type(self).__name__
        if config is not None and settings:
            raise SchemeError(
                f"{name} takes a config or settings by name, not both: "
                f"given a config and {sorted(settings)}"
            )
        try:
            self.config = config if config is not None else type(self).Config(**settings)
        except ValidationError as error:
            raise SchemeError(explain(error, name)) from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"


#: Errors whose message says itself what was given.
_SAYS_GIVEN = ("unknown_field", "unknown_type", "missing_type", "value_error", "missing")


def explain(error: ValidationError, where: str) -> str:
    """What pydantic found wrong, a line each: `where: path: what would be right (given ...)`.

    What single layers have from the scheme's own streams is said once, of those.
    """
    lines: list[str] = []
    problems = error.errors(include_url=False)
    own = [(problem["loc"], problem["msg"]) for problem in problems]
    for problem in problems:
        if problem["loc"][:1] == ("layers",) and (problem["loc"][2:], problem["msg"]) in own:
            continue
        place = ": ".join([where, ".".join(map(str, problem["loc"]))]).removesuffix(": ")
        said = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "too_short":
            if any(_inside(other, problem["loc"]) for other, _ in own):
                continue  # pydantic counts those that are right, and has told of the others
            said = f"give at least {problem['ctx']['min_length']}"
        elif problem["type"] == "too_long":
            said = f"give at most {problem['ctx']['max_length']}"
        given = "" if problem["type"] in _SAYS_GIVEN else f" (given {short(problem['input'])})"
        lines.append(f"{place}: {said}{given}")
    return "\n".join(lines)


def _inside(place: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    return place[: len(other)] == other and place != other


def short(value: Any) -> str:
    """A value for a message, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def did_you_mean(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """A closing clause for an error about `name`: near misses, then all the names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""
    return f"{hint} Known: {', '.join(sorted(known))}."


class Registry(Generic[T]):
    """The members of one entry-point group, by name.

    Args:
        group: the entry-point group, for example `"vqkv.quantizers"`.
        base: what every member must be: a subclass of it, or an instance.
        builtin: name to `"module:attribute"`.
    """

    def __init__(self, group: str, base: type[Any], builtin: Mapping[str, str]) -> None:
        self.group = group
        self.base = base
        self._builtin = dict(builtin)
        self._registered: dict[str, T] = {}
        self._loaded: dict[str, T] = {}
        #: Grows when members come or go by hand; what was derived from the old ones is stale.
        self.generation = 0

    @property
    def kind(self) -> str:
        """What one member is called in a message: `vqkv.quantizers` holds quantizers."""
        return self.group.rpartition(".")[2].removesuffix("s")

    def register(self, name: str, member: T) -> T:
        """Add a member by hand, for a notebook or a test. Raises RegistryError if taken."""
        if name in self.sources():
            raise RegistryError(f"{self.kind} {name!r} is already registered")
        self._check(name, member)
        self._registered[name] = member
        self.generation += 1
        return member

    def unregister(self, name: str) -> None:
        """Take back what `register` added."""
        del self._registered[name]
        self.generation += 1

    def sources(self) -> dict[str, list[str]]:
        """Every known name and who provides it, without importing anything."""
        found: dict[str, list[str]] = {name: ["vqkv"] for name in self._builtin}
        for name in self._registered:
            found.setdefault(name, []).append("registered by hand")
        for point in self._entry_points():
            found.setdefault(point.name, []).append(_describe(point))
        return found

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self.sources())

    def is_builtin(self, name: str) -> bool:
        """Whether it comes with vqkv."""
        return name in self._builtin

    def get(self, name: str) -> T:
        """The member called `name`.

        Raises:
            RegistryError: unknown (with near misses), claimed twice (naming both), or broken.
        """
        if name in self._loaded:
            return self._loaded[name]
        sources = self.sources()
        if name not in sources:
            raise RegistryError(f"no {self.kind} is called {name!r}.{did_you_mean(name, sources)}")
        if len(sources[name]) > 1:
            raise RegistryError(
                f"{self.kind} {name!r} is provided more than once: by "
                f"{' and by '.join(sources[name])}. Uninstall or rename one of them."
            )
        if name in self._registered:
            return self._registered[name]
        member = self._load(name)
        self._check(name, member)
        self._loaded[name] = member
        return member

    def working(self) -> Iterator[tuple[str, T]]:
        """All members that load; a broken or doubled one is warned of and left out."""
        for name in self.names():
            try:
                yield name, self.get(name)
            except RegistryError as error:
                warnings.warn(str(error), stacklevel=2)

    def build(self, config: Any) -> Any:
        """A new component from its config."""
        return cast(Any, self.get(config.type))(config)

    def _entry_points(self) -> list[EntryPoint]:
        return list(entry_points(group=self.group))

    def _load(self, name: str) -> T:
        try:
            if self.is_builtin(name):
                module, _, attribute = self._builtin[name].partition(":")
                return cast(T, getattr(importlib.import_module(module), attribute))
            (point,) = [point for point in self._entry_points() if point.name == name]
            return cast(T, point.load())
        except Exception as error:
            source = self.sources()[name][0]
            raise RegistryError(
                f"{self.kind} {name!r} from {source} does not load: {type(error).__name__}: {error}"
            ) from error

    def _check(self, name: str, member: T) -> None:
        if isinstance(member, type):
            fits = issubclass(member, self.base)
        else:
            fits = isinstance(member, self.base)
        if not fits:
            raise RegistryError(
                f"{self.kind} {name!r} is {member!r}, which is no {self.base.__name__}"
            )


def _describe(point: EntryPoint) -> str:
    package = point.dist.name if point.dist is not None else "an unnamed package"
    return f"{package} ({point.value})"


def config_class(member: Any) -> type[Config]:
    """The config of a registered class; a grouping is its own config."""
    if isinstance(member, type) and issubclass(member, Config):
        return member
    return cast(type[Config], member.Config)


class Choice:
    """Pydantic annotation: a config whose `type` names a member of a registry.

    Unlike a static union it sees plugins, and imports only the member that is named. In the JSON
    schema it is a placeholder, which `schema_with_members` replaces by the union of all members:
    a learner may hold a learner, so the union cannot be written out in place.
    """

    def __init__(self, registry: Registry[Any]) -> None:
        self.registry = registry

    def __repr__(self) -> str:
        return f"a {self.registry.kind}"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda config: config.model_dump(mode="json")
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {_MEMBER_OF: self.registry.group}

    def _validate(self, given: Any) -> Config:
        if isinstance(given, Config):
            return self._checked(given)
        if not isinstance(given, Mapping) or "type" not in given:
            raise PydanticCustomError(
                "missing_type",
                "give a block with `type`, one of: {names} (given {given})",
                {"names": ", ".join(self.registry.names()), "given": short(given)},
            )
        return self._config_of(given["type"]).model_validate(dict(given))

    def _checked(self, given: Config) -> Config:
        """A config that was built in Python, if it belongs here."""
        if not isinstance(given, self._config_of(getattr(given, "type", None))):
            raise PydanticCustomError(
                "unknown_type",
                "{given} is not the config of a {kind}",
                {"given": short(given), "kind": self.registry.kind},
            )
        return given

    def _config_of(self, name: Any) -> type[Config]:
        try:
            return config_class(self.registry.get(str(name)))
        except RegistryError as error:
            raise PydanticCustomError("unknown_type", "{reason}", {"reason": str(error)}) from error


_MEMBER_OF = "member_of"


def schema_with_members(root: type[Config], registries: Iterable[Registry[Any]]) -> dict[str, Any]:
    """The JSON schema of `root`, each choice in it the union of the members that load.

    Under `$defs` stand `root`, every member's config, and one union per registry.
    """
    unions = {
        registry.group: [config_class(member) for _, member in registry.working()]
        for registry in registries
    }
    configs = {root: None} | {config: None for union in unions.values() for config in union}
    refs, schema = models_json_schema([(config, "validation") for config in configs])
    schema["$defs"] |= {
        group: {"anyOf": [refs[config, "validation"] for config in union]}
        for group, union in unions.items()
    }
    filled: dict[str, Any] = _fill_in({**refs[root, "validation"], **schema})
    return filled


def _fill_in(node: Any) -> Any:
    """The same JSON with each placeholder of a choice replaced by a reference to its union."""
    if isinstance(node, list):
        return [_fill_in(item) for item in node]
    if not isinstance(node, dict):
        return node
    filled = {key: _fill_in(value) for key, value in node.items() if key != _MEMBER_OF}
    if _MEMBER_OF in node:
        filled["$ref"] = f"#/$defs/{node[_MEMBER_OF]}"
    return filled
