from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from vqkv import registry as registry_module
from vqkv.codebooks import LEARNERS
from vqkv.codebooks.kmeans import KMeansConfig
from vqkv.errors import RegistryError, SchemeError
from vqkv.groupings import GROUPINGS, Contiguous, Strided
from vqkv.quantizers.product import ProductConfig, ProductQuantizer
from vqkv.registry import Choice, Component, Config, Registry, explain
from vqkv.scheme_files import scheme_from_dict, scheme_schema

Install = Callable[..., None]


class Alpha(Component):
    class Config(registry_module.Config):
        type: Literal["alpha"] = "alpha"
        size: int = 1


class Stranger:
    pass


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Pretend that packages with these entry points are installed: name to `module:attribute`."""
    points: list[Any] = []

    def found(*, group: str) -> list[Any]:
        return [point for point in points if point.group == group]

    def add(group: str, package: str, **members: str) -> None:
        for name, value in members.items():
            point: Any = EntryPoint(name, value, group)
            points.append(point._for(types.SimpleNamespace(name=package)))

    monkeypatch.setattr(registry_module, "entry_points", found)
    return add


def letters(**builtin: str) -> Registry[type[Component]]:
    return Registry("test.letters", Component, builtin)


def test_unknown_name_lists_near_misses_and_all_names() -> None:
    known = letters(alpha=f"{__name__}:Alpha", beta="nowhere:Beta")
    with pytest.raises(RegistryError) as error:
        known.get("alpa")
    assert str(error.value) == (
        "no letter is called 'alpa'. Did you mean 'alpha'? Known: alpha, beta."
    )
    with pytest.raises(RegistryError, match=r"called 'zzz'\. Known: alpha, beta\.$"):
        known.get("zzz")


def test_plugins_are_found_and_built(install: Install) -> None:
    install("test.letters", "letters-plus", alpha=f"{__name__}:Alpha")
    known = letters()
    assert known.names() == ["alpha"]
    built = known.build(Alpha.Config(size=3))
    assert isinstance(built, Alpha) and built.config == Alpha.Config(size=3)


def test_two_plugins_with_one_name_are_both_named(install: Install) -> None:
    install("test.letters", "letters-one", alpha="one:Alpha")
    install("test.letters", "letters-two", alpha="two:Alpha")
    with pytest.raises(RegistryError, match=r"letters-one \(one:Alpha\).*letters-two \(two:Alpha"):
        letters().get("alpha")


def test_a_plugin_cannot_replace_a_built_in_member(install: Install) -> None:
    install("test.letters", "letters-one", alpha="one:Alpha")
    with pytest.raises(RegistryError, match=r"by vqkv and by letters-one \(one:Alpha\)"):
        letters(alpha=f"{__name__}:Alpha").get("alpha")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module:Beta", "ModuleNotFoundError"),
        (f"{__name__}:NoSuchName", "AttributeError"),
        (f"{__name__}:Stranger", "which is no Component"),
        (f"{__name__}:letters", "which is no Component"),
    ],
)
def test_a_broken_plugin_leaves_the_others_working(
    install: Install, value: str, reason: str
) -> None:
    install("test.letters", "letters-bad", beta=value)
    known = letters(alpha=f"{__name__}:Alpha")
    assert known.get("alpha") is Alpha
    with pytest.raises(RegistryError, match=reason) as error:
        known.get("beta")
    assert "'beta'" in str(error.value)
    with pytest.warns(UserWarning, match="'beta'"):
        assert dict(known.working()) == {"alpha": Alpha}


def test_a_broken_plugin_is_named_with_its_package(install: Install) -> None:
    install("test.letters", "letters-bad", beta="no_such_module:Beta")
    with pytest.raises(RegistryError, match=r"from letters-bad \(no_such_module:Beta\)"):
        letters().get("beta")


def test_a_member_is_loaded_only_when_asked_for() -> None:
    code = (
        "import sys, vqkv.scheme, vqkv.scheme_files\n"
        "lazy = ['vqkv.quantizers.residual', 'vqkv.codebooks.ema', 'vqkv.transforms.hadamard',"
        " 'transformers']\n"
        "print([name for name in lazy if name in sys.modules])\n"
        "vqkv.scheme_files.load_scheme('cq-4c8b')\n"
        "print([name for name in lazy if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_registered_by_hand() -> None:
    known = letters()
    before = known.generation
    known.register("alpha", Alpha)
    assert known.get("alpha") is Alpha
    with pytest.raises(RegistryError, match="already registered"):
        known.register("alpha", Alpha)
    known.unregister("alpha")
    assert known.names() == [] and known.generation == before + 2
    with pytest.raises(RegistryError, match="no Component"):
        known.register("stranger", Stranger)  # type: ignore[arg-type]


# -- configs -----------------------------------------------------------------------------------


class Holder(Config):
    grouping: Annotated[Any, Choice(GROUPINGS)]
    inner: Any = None


def problems(given: Any) -> str:
    with pytest.raises(ValidationError) as error:
        Holder.model_validate(given)
    return explain(error.value, "file")


def test_choice_builds_the_named_config() -> None:
    assert Holder.model_validate({"grouping": {"type": "strided", "dim": 4}}).grouping == Strided(
        dim=4
    )
    assert Holder(grouping=Strided(dim=4)).grouping == Strided(dim=4)


def test_choice_needs_a_type() -> None:
    assert problems({"grouping": {"dim": 4}}) == (
        "file: grouping: give a block with `type`, one of: across_heads, contiguous, "
        "energy_balanced, rope_pairs, strided, whole (given {'dim': 4})"
    )
    assert "one of: across_heads" in problems({"grouping": "strided"})
    assert "no grouping is called '7'" in problems({"grouping": {"type": 7}})


def test_choice_refuses_a_config_of_another_kind() -> None:
    assert "no grouping is called 'kmeans'" in problems({"grouping": KMeansConfig()})
    assert "no grouping is called 'None'" in problems({"grouping": Holder(grouping=Strided(dim=2))})


def test_unknown_fields_come_with_path_value_and_near_miss() -> None:
    assert problems({"grouping": {"type": "strided", "dim": 4}, "iner": 5, "outer": 6}).split(
        "\n"
    ) == [
        "file: iner: unknown field (given 5). Did you mean 'inner'? Known: grouping, inner.",
        "file: outer: unknown field (given 6). Known: grouping, inner.",
    ]
    assert problems({"grouping": {"type": "strided", "dims": 4}}).startswith(
        "file: grouping.dims: unknown field (given 4). Did you mean 'dim'?"
    )


def test_configs_are_frozen_and_hashable() -> None:
    config = ProductConfig(code_bits=4)
    assert hash(config) == hash(ProductConfig(code_bits=4))
    with pytest.raises(ValidationError):
        config.code_bits = 5


def test_a_component_takes_settings_or_a_config() -> None:
    assert ProductQuantizer(code_bits=4).config == ProductConfig(code_bits=4)
    with pytest.raises(SchemeError, match="not both"):
        ProductQuantizer(ProductConfig(code_bits=4), code_bits=4)
    with pytest.raises(SchemeError, match=r"ProductQuantizer: code_bit: unknown field \(given 4\)"):
        ProductQuantizer(code_bit=4)


# -- plugins in schemes ------------------------------------------------------------------------


class Reversed(Contiguous):
    type: Literal["reversed"] = "reversed"  # type: ignore[assignment]
    flips: int = 1


def test_plugin_members_validate_and_appear_in_the_schema(install: Install) -> None:
    install("vqkv.groupings", "reversing", reversed=f"{__name__}:Reversed")
    stream = {
        "grouping": {"type": "reversed", "dim": 4, "flips": 2},
        "quantizer": {"type": "product", "code_bits": 2},
    }
    scheme = scheme_from_dict({"name": "x", "keys": {"rope": "pre", **stream}, "values": stream})
    assert scheme.values.grouping == Reversed(dim=4, flips=2)
    schema = scheme_schema()
    assert {"$ref": "#/$defs/Reversed"} in schema["$defs"]["vqkv.groupings"]["anyOf"]
    assert "flips" in schema["$defs"]["Reversed"]["properties"]
    GROUPINGS._loaded.pop("reversed")


def test_a_broken_plugin_leaves_the_schema_working(install: Install) -> None:
    install("vqkv.learners", "bad", broken="no_such_module:Learner")
    with pytest.warns(UserWarning, match="'broken' from bad"):
        assert "KMeansConfig" in scheme_schema()["$defs"]
    assert LEARNERS.get("kmeans").Config is KMeansConfig


class Several(Config):
    numbers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, max_length=2)


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "file: numbers: give at least 1 (given [])"),
        ([1, 2, 3], "file: numbers: give at most 2 (given [1, 2, 3])"),
        ((), "file: numbers: give at least 1 (given ())"),
        ([-1], "file: numbers.0: Input should be greater than or equal to 0 (given -1)"),
    ],
)
def test_lists_of_a_wrong_length(given: Sequence[int], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        Several.model_validate({"numbers": given})
    assert explain(error.value, "file") == message


def test_what_has_no_length_is_explained_too() -> None:
    with pytest.raises(ValidationError) as error:
        Several.model_validate({"numbers": iter(())})
    assert explain(error.value, "file").startswith("file: numbers: give at least 1 (given <")
