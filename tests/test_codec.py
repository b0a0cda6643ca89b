from __future__ import annotations

from typing import Any

import pytest
import torch

from vqkv.codec import Codec, Encoded
from vqkv.errors import NotFittedError, SchemeError, StateError
from vqkv.rotation import rope_pairs
from vqkv.scheme import KeysConfig, StreamConfig
from vqkv.states import States

HEADS, HEAD_DIM, TOKENS = 3, 8, 96
PAIRS = rope_pairs("half", HEAD_DIM)
PRODUCT = {"type": "product", "code_bits": 3, "learner": {"type": "kmeans", "iterations": 3}}

GROUPINGS: list[dict[str, Any]] = [
    {"type": "contiguous", "dim": 4},
    {"type": "strided", "dim": 2},
    {"type": "rope_pairs", "dim": 4},
    {"type": "energy_balanced", "dim": 2},
    {"type": "energy_balanced", "dim": 4, "pairs": True},
    {"type": "across_heads", "dim": 6},
]
SHARINGS = ("group", "head", "layer", "subspace", "model")
COMBINATIONS = [
    pytest.param(grouping, sharing, id=f"{grouping['type']}-{grouping['dim']}-{sharing}")
    for grouping in GROUPINGS
    for sharing in SHARINGS
    if grouping["type"] != "across_heads" or sharing not in ("head", "subspace")
]
each = pytest.mark.parametrize(("grouping", "sharing"), COMBINATIONS)


def states(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HEADS, HEAD_DIM, generator=generator)
    return x * torch.linspace(0.5, 2, HEAD_DIM) + torch.arange(HEADS).view(-1, 1)


def build(**settings: Any) -> Codec:
    settings = {"grouping": GROUPINGS[0], "quantizer": PRODUCT, **settings}
    if "segments" in settings:
        del settings["quantizer"]
    kind = KeysConfig if "rope" in settings else StreamConfig
    config = kind.model_validate(settings)
    return Codec(config, HEADS, HEAD_DIM, PAIRS, "keys of layer 3")


def fitted(**settings: Any) -> Codec:
    return build(**settings).fit(States.of(states()), samples=TOKENS)


def codebook_of_each_channel(codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """For each channel of a token: which subvector it is in, and which codebook that reads."""
    (segment,) = codec.layout.segments
    subvector = torch.zeros(HEADS * HEAD_DIM, dtype=torch.int64)
    subvector[codec.order_.flatten()] = torch.arange(HEADS * HEAD_DIM) // segment.dim
    unit = torch.arange(segment.subvectors) // segment.groups
    book = {
        "group": torch.arange(segment.subvectors),
        "head": unit,
        "subspace": torch.arange(segment.subvectors) % segment.groups,
    }.get(codec.config.sharing, torch.zeros(segment.subvectors, dtype=torch.int64))
    return subvector, book


@each
def test_every_subvector_becomes_the_nearest_codeword_of_its_codebook(
    grouping: dict[str, Any], sharing: str
) -> None:
    codec = fitted(grouping=grouping, sharing=sharing)
    x = states(11, seed=1)
    y = codec.decode(codec.encode(x)).flatten(1)
    books = codec.quantizers[0].state()["codewords"][:, 0].float()  # [books, K, d]
    (segment,) = codec.layout.segments
    expected_books = {"group": segment.subvectors, "head": HEADS, "subspace": segment.groups}
    assert len(books) == expected_books.get(sharing, 1)
    subvector, book = codebook_of_each_channel(codec)
    order = codec.order_.flatten()
    for index in range(segment.subvectors):
        channels = order[subvector[order] == index]
        distances = torch.cdist(x.flatten(1)[:, channels], books[book[index]])
        chosen = books[book[index]][distances.argmin(1)]
        torch.testing.assert_close(y[:, channels], chosen, rtol=0, atol=0)


@each
def test_tokens_are_coded_one_by_one(grouping: dict[str, Any], sharing: str) -> None:
    codec = fitted(grouping=grouping, sharing=sharing, transforms=[{"type": "token_scale"}])
    x = states(13, seed=2)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    whole, shuffled = codec.encode(x), codec.encode(x[order])
    assert torch.equal(whole.codes[order], shuffled.codes)
    assert torch.equal(whole.side[order], shuffled.side)
    one = codec.encode(x[4:5])
    assert torch.equal(one.codes, whole.codes[4:5])
    assert torch.equal(codec.decode(one), codec.decode(whole)[4:5])


@each
def test_no_tokens(grouping: dict[str, Any], sharing: str) -> None:
    codec = fitted(grouping=grouping, sharing=sharing, transforms=[{"type": "token_scale"}])
    encoded = codec.encode(states(0))
    assert encoded.nbytes == 0
    assert codec.decode(encoded).shape == (0, HEADS, HEAD_DIM)


CHAINS: list[list[dict[str, Any]]] = [
    [],
    [{"type": "center"}, {"type": "token_scale", "stat": "std"}],
    [{"type": "channel_scale"}, {"type": "hadamard"}, {"type": "token_scale", "scope": "layer"}],
    [{"type": "token_scale", "stat": "minmax"}, {"type": "token_scale", "stat": "l2"}],
    [{"type": "hadamard", "scope": "layer"}],
]


@each
@pytest.mark.parametrize("transforms", CHAINS, ids=lambda chain: f"{len(chain)}")
def test_without_quantization_everything_comes_back(
    transforms: list[dict[str, Any]], grouping: dict[str, Any], sharing: str
) -> None:
    codec = fitted(
        grouping=grouping, sharing=sharing, transforms=transforms, quantizer={"type": "identity"}
    )
    x = states(9, seed=3)
    torch.testing.assert_close(codec.decode(codec.encode(x)), x, rtol=1e-4, atol=1e-4)


def test_transforms_learn_from_what_those_before_them_make() -> None:
    codec = fitted(transforms=[{"type": "center"}, {"type": "channel_scale", "stat": "rms"}])
    z, _ = codec._forward(states())
    torch.testing.assert_close(z.square().mean(0), torch.ones(HEADS, HEAD_DIM), rtol=2e-3, atol=0)


def test_energy_is_that_of_transformed_channels() -> None:
    plain = fitted(grouping={"type": "energy_balanced", "dim": 2})
    centred = fitted(
        grouping={"type": "energy_balanced", "dim": 2}, transforms=[{"type": "center"}]
    )
    energy = states().sub(states().mean(0)).square().mean(0)
    strongest = energy.argmax(1) + HEAD_DIM * torch.arange(HEADS)
    assert torch.equal(centred.order_[:, 0], strongest)
    assert not torch.equal(plain.order_, centred.order_)


# -- segments ----------------------------------------------------------------------------------

SEGMENTS = [
    {"share": 0.25, "dim": 1, "quantizer": {"type": "identity", "dtype": "float32"}},
    {"share": 0.25, "dim": 2, "quantizer": {"type": "product", "code_bits": 5}},
    {
        "share": 0.25,
        "dim": 1,
        "quantizer": {"type": "residual", "depth": 2, "code_bits": 3},
    },
    {"share": 0.25, "dim": 2, "quantizer": {"type": "product", "code_bits": 0}},
]


@pytest.mark.parametrize("sharing", SHARINGS)
def test_segments_have_rates_of_their_own(sharing: str) -> None:
    codec = fitted(segments=SEGMENTS, sharing=sharing)
    bits = [2 * 32, 5, 2 * 2 * 3, 0]  # of a head, for 2 channels each
    assert [8 * s.bytes_per_unit for s in codec.layout.segments] == [64, 8, 16, 0]
    assert [s.codes_per_unit * s.code_bits for s in codec.layout.segments] == bits
    x = states(10, seed=4)
    encoded = codec.encode(x)
    assert encoded.codes.shape == (10, HEADS, 11)
    y = codec.decode(encoded)
    assert torch.equal(y[..., :2], x[..., :2])
    errors = (y - x).square().mean((0, 1))
    assert (errors[:2] == 0).all() and (errors[2:] > 0).all()


def test_zero_bits_keep_the_mean() -> None:
    codec = fitted(quantizer={"type": "product", "code_bits": 0})
    encoded = codec.encode(states(7, seed=5))
    assert encoded.nbytes == 0 and len(codec.decode(encoded)) == 7
    torch.testing.assert_close(
        codec.decode(encoded), states().mean(0).expand(7, -1, -1), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize(
    ("grouping", "segment_dims", "whole"),
    [
        (GROUPINGS[2], (None, None), True),
        (GROUPINGS[2], (2, 4), True),
        (GROUPINGS[2], (1, 4), False),
        (GROUPINGS[4], (2, 2), True),
        (GROUPINGS[4], (4, 1), False),
        (GROUPINGS[0], (4, 4), False),
    ],
)
def test_pairs_are_whole_only_if_every_segment_keeps_them(
    grouping: dict[str, Any], segment_dims: tuple[int | None, ...], whole: bool
) -> None:
    segments = [{"share": 0.5, "dim": dim, "quantizer": PRODUCT} for dim in segment_dims]
    codec = fitted(grouping=grouping, segments=segments, rope="pre")
    assert codec.layout.pairs_whole is whole
    start, group_of = 0, torch.zeros(HEAD_DIM, dtype=torch.int64)
    for segment in codec.layout.segments:
        for group in range(segment.groups):
            channels = codec.order_[0, start : start + segment.dim]
            group_of[channels] = 100 * segment.dim + 10 * group + start
            start += segment.dim
    assert whole == all(group_of[i] == group_of[j] for i, j in PAIRS)


# -- what a kernel is told ---------------------------------------------------------------------


def test_layout() -> None:
    codec = build(
        rope="pre",
        transforms=[{"type": "center"}, {"type": "token_scale", "stat": "minmax"}],
        grouping=GROUPINGS[1],
        sharing="head",
    )
    layout = codec.layout
    assert (layout.heads, layout.head_dim, layout.rope, layout.sharing) == (3, 8, "pre", "head")
    assert [(field.name, field.count) for field in layout.side] == [("token_scale", 6)]
    assert layout.head_local and layout.pairs_whole
    assert build().layout.rope is None
    assert not build(grouping=GROUPINGS[5]).layout.head_local
    assert not build(transforms=[{"type": "hadamard", "scope": "layer"}]).layout.head_local


# -- what is refused ---------------------------------------------------------------------------


def test_settings_that_do_not_fit_are_refused_with_the_streams_name() -> None:
    with pytest.raises(
        SchemeError, match=r"keys of layer 3: grouping\.dim: 5 does not divide head dim 8; one of"
    ):
        build(grouping={"type": "contiguous", "dim": 5})
    with pytest.raises(SchemeError, match=r"keys of layer 3: hadamard\.block: 3 does not divide"):
        build(transforms=[{"type": "hadamard", "block": 3}])
    with pytest.raises(
        SchemeError,
        match=r"layer 3: segments\.1: share 0\.75 of 8 channels is 6, which groups of dim 4 do not",
    ):
        build(
            segments=[
                {"share": 0.25, "dim": 2, "quantizer": PRODUCT},
                {"share": 0.75, "quantizer": PRODUCT},
            ]
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_states_that_are_not_finite_are_refused_with_their_place(value: float) -> None:
    codec = fitted()
    x = states(5)
    x[2, 1, 7] = value
    for use in (codec.encode, lambda bad: build().fit(States.of(bad), samples=5)):
        with pytest.raises(
            StateError,
            match=rf"keys of layer 3: states \[N, H, D\] hold {value} at \[2, 1, 7\]; all must be",
        ):
            use(x)


def test_statistics_do_not_hide_states_that_are_not_finite() -> None:
    x = states(500)
    x[499, 0, 0] = float("nan")
    with pytest.raises(StateError, match=r"keys of layer 3: states .* hold nan at \[499, 0, 0\]"):
        build(transforms=[{"type": "center"}]).fit(States.of(x), samples=16)


@pytest.mark.parametrize("shape", [(5, 3, 9), (5, 2, 8), (5, 24), (1, 5, 3, 8)])
def test_states_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    message = (
        rf"keys of layer 3: states have shape \[N, 3, 8\], given \[{', '.join(map(str, shape))}\]"
    )
    with pytest.raises(StateError, match=message):
        fitted().encode(torch.zeros(shape))
    with pytest.raises(StateError, match=message):
        build().fit(States.of(torch.zeros(shape)), samples=16)


def test_too_large_tokens_are_refused_with_the_streams_name() -> None:
    codec = fitted(transforms=[{"type": "token_scale"}])
    with pytest.raises(StateError, match="keys of layer 3: a token's scale is"):
        codec.encode(states(5) * 1e6)


def test_too_few_tokens() -> None:
    with pytest.raises(StateError, match="keys of layer 3: 8 codewords need at least as many"):
        build().fit(States.of(states(5)), samples=16)
    with pytest.raises(StateError, match="keys of layer 3: there are no tokens to learn from"):
        build().fit(States.of(states(0)), samples=16)


def test_not_fitted() -> None:
    codec = build()
    for use in (
        lambda: codec.encode(states(2)),
        lambda: codec.decode(
            Encoded(torch.zeros(1, 3, 1, dtype=torch.uint8), torch.zeros(1, 0).half())
        ),
        codec.state,
    ):
        with pytest.raises(NotFittedError, match="call fit"):
            use()


def test_codes_of_another_layout_are_refused() -> None:
    codec = fitted(transforms=[{"type": "token_scale"}])
    encoded = codec.encode(states(4))
    for wrong in (
        Encoded(encoded.codes[..., :-1], encoded.side),
        Encoded(encoded.codes[:, :2], encoded.side),
        Encoded(encoded.codes, encoded.side[:, :1]),
    ):
        with pytest.raises(StateError, match=r"a token has codes \[3, 1\] and side \[3\], given"):
            codec.decode(wrong)


# -- state -------------------------------------------------------------------------------------

FULL: dict[str, Any] = {
    "transforms": [{"type": "center"}, {"type": "hadamard"}, {"type": "channel_scale"}],
    "grouping": {"type": "energy_balanced", "dim": 2},
    "segments": [
        {"share": 0.5, "quantizer": PRODUCT},
        {"share": 0.5, "quantizer": {"type": "residual", "depth": 2, "code_bits": 3}},
    ],
}


def test_state_changes_no_bit() -> None:
    codec = fitted(**FULL)
    state = codec.state()
    assert sorted(state) == [
        "order",
        "segments.0.codewords",
        "segments.1.codewords",
        "transforms.0.channels",
        "transforms.2.channels",
    ]
    loaded = build(**FULL).load_state({name: t.clone() for name, t in state.items()})
    x = states(21, seed=6)
    one, two = codec.encode(x), loaded.encode(x)
    assert torch.equal(one.codes, two.codes) and torch.equal(one.side, two.side)
    assert torch.equal(codec.decode(one), loaded.decode(two))
    assert sum(t.nbytes for t in state.values()) == codec.planned_bytes()


def test_the_order_is_saved_where_it_was_learned() -> None:
    codec = fitted(grouping={"type": "energy_balanced", "dim": 2})
    loaded = build(grouping={"type": "energy_balanced", "dim": 2}).load_state(codec.state())
    assert torch.equal(loaded.order_, codec.order_)
    assert not torch.equal(codec.order_, torch.arange(HEADS * HEAD_DIM).view(HEADS, -1))
    assert "order" not in fitted(grouping=GROUPINGS[1]).state()


def test_moving_changes_no_bit() -> None:
    codec = fitted(**FULL)
    moved = codec.to(torch.device("cpu"))
    x = states(5, seed=7)
    assert torch.equal(moved.encode(x).codes, codec.encode(x).codes)
    assert moved.health == codec.health


def broken_states() -> list[tuple[str, Any, str]]:
    def order(change: Any) -> Any:
        return lambda state: state.update(order=change(state["order"]))

    def drop(name: str) -> Any:
        return lambda state: state.pop(name)

    def cut(name: str) -> Any:
        return lambda state: state.update({name: state[name][:1].clone()})

    return [
        ("codebooks gone", drop("segments.1.codewords"), "state holds 'codewords' alone, given"),
        ("fewer codebooks", cut("segments.0.codewords"), "there are 6 codebooks of dim 2, given 1"),
        ("channels gone", drop("transforms.0.channels"), "state holds 'channels'"),
        (
            "fewer channels",
            cut("transforms.2.channels"),
            r"channels have shape \[3, 8\], given \[1, 8\]",
        ),
        ("order gone", drop("order"), r"'order' has shape \[3, 8\], given None"),
        ("flat order", order(lambda o: o.flatten()), r"'order' has shape \[3, 8\], given \[24\]"),
        ("order twice", order(lambda o: o.clamp_max(5)), "'order' is no permutation"),
        (
            "more",
            lambda state: state.update(bias=torch.zeros(1)),
            r"state has unknown tensors \['bias'\]",
        ),
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [pytest.param(damage, message, id=name) for name, damage, message in broken_states()],
)
def test_states_that_do_not_fit_are_refused(damage: Any, message: str) -> None:
    state = fitted(**FULL).state()
    damage(state)
    with pytest.raises(StateError, match=rf"^keys of layer 3: {message}"):
        build(**FULL).load_state(state)


def test_units_of_other_heads_are_refused() -> None:
    """Codebooks of any quantizer take the bytes that were planned, whatever they are called."""
    settings: dict[str, Any] = {
        "rope": "pre",
        "grouping": {"type": "rope_pairs", "dim": 4},
        "quantizer": {"type": "rope_commutative", "rate": 2, "size": 4, "em": {"iterations": 2}},
    }
    state = fitted(**settings).state()
    state["segments.0.units"] = state["segments.0.units"][:2].clone()
    with pytest.raises(
        StateError, match=r"^keys of layer 3: rope_commutative: .* for 6 codebooks of dim 4, given"
    ):
        build(**settings).load_state(state)


def test_data_free_codecs_are_ready_at_once_and_stay_as_they_are() -> None:
    settings: dict[str, Any] = {
        "transforms": [{"type": "token_scale", "stat": "minmax"}],
        "grouping": {"type": "contiguous", "dim": 1},
        "sharing": "layer",
        "quantizer": {
            "type": "product",
            "code_bits": 4,
            "learner": {"type": "uniform", "low": 0.0, "high": 1.0},
        },
    }
    codec = build(**settings)
    x = states(6)
    y = codec.decode(codec.encode(x))
    step = (x.amax(-1) - x.amin(-1)) / 16
    assert ((y - x).abs().amax(-1) <= 0.51 * step + 1e-3).all()
    before = codec.state()["segments.0.codewords"].clone()
    codec.fit(States.of(states(1)), samples=1)
    assert torch.equal(codec.state()["segments.0.codewords"], before)


def test_health_tells_of_each_learned_stage() -> None:
    codec = fitted(**FULL)
    assert len(codec.health) == 3
    assert all(0 < stage.entropy <= 3 for stage in codec.health)
    assert build(**FULL).health == []
