"""Every GPU kernel on a real GPU, where there is one, against the naive kernels on the CPU.

`TRITON_INTERPRET=0 python -m pytest tests/kernels/test_on_gpu.py`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cache.compressors import random_ids
from tests.cache.test_fused import PREDICTED, byte_compressor, logits
from tests.cache.test_steps import decoded as decoded_steps
from tests.cli.test_devices import calibrated_and_evaluated
from tests.kernels import test_attend_cuda, test_attend_rest, test_triton_attend
from tests.kernels.coded_cases import Case, askew, problem, with_codes
from tests.kernels.test_attend_cuda import rounded
from tests.kernels.test_decode_codes import CASES as DECODED
from tests.kernels.test_encode_decode import make
from tests.kernels.test_encode_heads import case as heads_case
from tests.kernels.test_encode_heads import cost as heads_cost
from tests.kernels.test_encode_joint import case as joint_case
from tests.kernels.test_encode_joint import cost
from tests.kernels.test_triton_attend import assert_equal_up_to_fp16
from tests.tiny_models import tiny_model
from vqkv.cache import attach
from vqkv.errors import KernelError
from vqkv.kernels import gpu, recording, select, using
from vqkv.kernels.attend.codes import Coded, Partial, Plane, Turns, attend_codes
from vqkv.kernels.attend.codes_naive import decoded, rotated
from vqkv.kernels.attend.codes_op import first_odd
from vqkv.kernels.attend.rest import Rest, attend_rest
from vqkv.kernels.cuda.configs import odd_shape
from vqkv.kernels.decode import decode
from vqkv.kernels.decode.codes import decode_codes
from vqkv.kernels.encode import encode
from vqkv.kernels.encode.heads import encode_heads
from vqkv.kernels.encode.joint import Coupling, encode_joint
from vqkv.kernels.encode.pair import encode_pair

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(gpu.interpreting(), reason="Triton's interpreter is asked for"),
]

GPU = "cuda"
CASES = [*test_triton_attend.CASES, *test_attend_cuda.CASES]
#: Long enough for many splits, and for several pages a warp.
LONG = [
    Case(head_dim=128, heads=3, group=4, lengths=(9000, 64 * 100, 1, 0), rope=False),
    Case(head_dim=128, heads=2, group=4, lengths=(20000, 777), key_sums=True, sinks=4),
    Case(head_dim=128, dim=8, heads=2, group=4, lengths=(20000, 777), paged=True),
]


def on_gpu(value: Any) -> Any:
    """A tensor, or a tuple of them, on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.to(GPU)
    if isinstance(value, (Coded, Plane, Turns, Coupling, Partial, Rest)):
        return type(value)(*map(on_gpu, value))
    if isinstance(value, tuple):
        return tuple(map(on_gpu, value))
    return value


def readers(case: Case) -> list[str]:
    names = ["triton"]
    return names if first_odd(case.layout, odd_shape) else [*names, "cuda"]


def on_both(query: torch.Tensor, coded: Coded, case: Case, kernel: str) -> tuple[Partial, Partial]:
    """What the naive kernel gives on the CPU, and what another does on the GPU."""
    with using(attend_codes="naive"):
        expected = attend_codes(query, rounded(coded) if kernel == "cuda" else coded, case.layout)
    with using(attend_codes=kernel), recording() as ran:
        found = attend_codes(on_gpu(query), on_gpu(coded), case.layout)
    assert ran == [f"attend_codes.{kernel}"]
    return expected, found


def assert_close(expected: Partial, found: Partial) -> None:
    """fp16 sums of several stages are rounded in other places than the interpreter's."""
    assert found.output.is_cuda
    key_mean = None if found.key_mean is None else found.key_mean.cpu()
    on_cpu = Partial(found.output.cpu(), found.lse.cpu(), key_mean)
    assert_equal_up_to_fp16(expected, on_cpu, bound=3e-3)


@pytest.mark.parametrize(
    "case, kernel", [(case, kernel) for case in CASES + LONG for kernel in readers(case)], ids=str
)
def test_attention_equals_the_naive_kernel(case: Case, kernel: str) -> None:
    assert_close(*on_both(*problem(case), case, kernel))


@pytest.mark.parametrize("kernel", ["triton", "cuda"])
def test_codes_that_lie_askew_are_read(kernel: str) -> None:
    case = Case(rope=False, lengths=(67, 67), group=4)
    query, coded = problem(case)
    assert_close(*on_both(query, with_codes(coded, askew), case, kernel))


@pytest.mark.parametrize("kernel", ["triton", "cuda"])
def test_attention_replays_in_a_graph_on_other_contexts(kernel: str) -> None:
    """A launch is fixed, what it reads is not: lengths may change between replays."""
    case = Case(head_dim=128, heads=2, group=4, lengths=(5000, 640), key_sums=True)
    query, coded = (on_gpu(each) for each in problem(case))
    with using(attend_codes=kernel):
        attend_codes(query, coded, case.layout)  # compiles, and makes tables
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = attend_codes(query, coded, case.layout)
        query.neg_()
        coded.stop.copy_(torch.tensor([3001, 64]))
        graph.replay()
        expected = attend_codes(query, coded, case.layout)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kernel", ["triton", "cuda"])
def test_attention_compiles_as_one_graph(kernel: str) -> None:
    case = Case(head_dim=128, group=4, lengths=(700,))
    query, coded = (on_gpu(each) for each in problem(case))
    with using(attend_codes=kernel):
        run = select("attend_codes", case.layout, GPU).kernel.run
    compiled = torch.compile(lambda q: run(q * 2, coded).output + 1, fullgraph=True)
    torch.testing.assert_close(compiled(query), run(query * 2, coded).output + 1)


def test_codebooks_are_not_converted_while_a_graph_is_captured() -> None:
    case = Case(head_dim=128, group=4, lengths=(700,))
    query, coded = (on_gpu(each) for each in problem(case))
    with using(attend_codes="cuda"):
        attend_codes(query, coded, case.layout)
        fresh = coded._replace(keys=coded.keys._replace(codewords=coded.keys.codewords.clone()))
        with (
            pytest.raises(KernelError, match="before a graph is captured"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            attend_codes(query, fresh, case.layout)


@pytest.mark.parametrize("case", test_attend_rest.CASES + test_attend_rest.HALVES, ids=str)
def test_exact_tokens_are_taken_in(case: test_attend_rest.Case) -> None:
    given = test_attend_rest.problem(case)
    with recording() as ran:
        found = attend_rest(*map(on_gpu, given))
    assert ran == ["attend_rest.triton"]
    expected = test_attend_rest.truth(*given).float()
    torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 8, 1, 256, 4), (70, 3, 1, 256, 2), (1300, 5, 2, 200, 8)])
def test_codes_name_the_nearest_codewords(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    x, books = make(shape)
    with using(encode="triton"):
        codes = encode(x.to(GPU, dtype), books.to(GPU)).cpu()
    residual, subvectors = x.to(dtype).double(), torch.arange(shape[1])
    for stage in range(shape[2]):
        distances = (residual.unsqueeze(2) - books[:, stage].double()).square().sum(-1)
        chosen = books[:, stage].double()[subvectors, codes[..., stage].long()]
        assert ((residual - chosen).square().sum(-1) <= distances.amin(-1) + 1e-4).all()
        residual = residual - chosen
    with using(decode="triton"):
        found = decode(codes.to(GPU), books.to(GPU))
    torch.testing.assert_close(found.cpu(), (x.to(dtype).double() - residual).float())


def test_pairs_of_streams_are_encoded_alike() -> None:
    (keys, key_books), (values, value_books) = make((70, 3, 1, 256, 4)), make((70, 5, 1, 200, 8))
    arguments = [each.to(GPU) for each in (keys, key_books, values, value_books)]
    with using(encode_pair="triton", encode="triton"):
        found = encode_pair(*arguments)
        expected = (encode(*arguments[:2]), encode(*arguments[2:]))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.int(), other)


@pytest.mark.parametrize(
    "shape", [(1, 8, 32, 256, 4), (1300, 2, 16, 256, 8), (300, 2, 5, 16, 3)], ids=str
)
def test_codes_chosen_together_are_as_good(shape: tuple[int, int, int, int, int]) -> None:
    given = joint_case(*shape)
    with using(encode_joint="naive", encode="naive"):
        expected = encode_joint(*given, sweeps=3)
    with using(encode_joint="triton"):
        x, words, coupled = map(on_gpu, given)
        found = encode_joint(x, words, coupled, sweeps=3).cpu()
    assert (expected == found).float().mean() > 0.98
    assert cost(*given, found) == pytest.approx(cost(*given, expected), rel=1e-3)


@pytest.mark.parametrize(
    "shape", [(70, 1, 8, 32, 256, 4), (5000, 2, 4, 16, 256, 8), (300, 1, 3, 5, 16, 3)], ids=str
)
def test_heads_coded_together_are_as_good(shape: tuple[int, int, int, int, int, int]) -> None:
    given = heads_case(*shape)
    with using(encode_heads="naive", encode="naive"):
        expected = encode_heads(*given, sweeps=2)
    with using(encode_heads="triton"):
        x, words, coupling = map(on_gpu, given)
        found = encode_heads(x, words, coupling, sweeps=2).cpu()
    assert (expected == found).float().mean() > 0.98
    assert heads_cost(*given, found) == pytest.approx(heads_cost(*given, expected), rel=1e-3)


@pytest.mark.parametrize("case", DECODED, ids=str)
def test_pages_are_decoded(case: Case) -> None:
    _, coded = problem(case)
    expected = decoded(coded.keys, coded.pages)
    if coded.turns is not None:
        expected = rotated(expected, coded.turns)
    keys, turns, pages = on_gpu(coded.keys), on_gpu(coded.turns), on_gpu(coded.pages)
    with using(decode_codes="triton"):
        states = decode_codes(keys, range(64, 101), case.layout.keys, turns, pages, torch.float16)
    torch.testing.assert_close(states.cpu(), expected[:, :, 64:101].half(), atol=4e-3, rtol=1e-3)


def test_a_copy_before_attention_in_a_graph_is_waited_for() -> None:
    """Attention may begin while what is before it in a stream still runs."""
    case = Case(head_dim=128, group=4, lengths=(700,))
    query, coded = (on_gpu(each) for each in problem(case))
    given = query.clone()
    with using(attend_codes="cuda"):
        expected = attend_codes(query * 2, coded, case.layout)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            query.copy_(given)
            found = attend_codes(query, coded, case.layout)
    given.mul_(2)
    graph.replay()
    torch.testing.assert_close(found.output, expected.output)


@pytest.mark.parametrize("rope", ["pre", "post"])
@pytest.mark.parametrize("head_dim, kernel", [(16, "triton"), (64, "cuda")])
def test_a_model_reads_codes(rope: str, head_dim: int, kernel: str) -> None:
    model: Any = tiny_model("llama", max_position_embeddings=1024, head_dim=head_dim)
    compressor = byte_compressor(model, rope, **PREDICTED)
    model.to(GPU)
    sizes, pads = (200, 1, 1), (10, 80)
    expected, _ = logits(model, compressor, "decode", sizes, pads)
    found, ran = logits(model, compressor, "attend", sizes, pads)
    fused = [name for name in ran if name.startswith("attend_codes")]
    assert fused == [f"attend_codes.{kernel}"] * 2 * len(compressor.geometry.compressed)
    # Codebooks of `cuda` are rounded to fp8, by a sixteenth at most.
    bound = 5e-2 if kernel == "cuda" else 2e-3
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("pads", [(0,), (10, 0, 80)])
@pytest.mark.parametrize("rope, head_dim", [("pre", 16), ("pre", 64), ("post", 64)])
def test_steps_are_captured_and_replayed(rope: str, head_dim: int, pads: tuple[int, ...]) -> None:
    model: Any = tiny_model("llama", max_position_embeddings=1024, head_dim=head_dim)
    compressor = byte_compressor(model, rope, **PREDICTED)
    model.to(GPU)
    expected, *_ = decoded_steps(model, compressor, pads, 140, fixed=False)
    found, _, taken = decoded_steps(model, compressor, pads, 140, fixed=True)
    assert taken >= 140 - 3 * len(pads)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_generation_replays_graphs() -> None:
    model: Any = tiny_model("llama", max_position_embeddings=1024, head_dim=64)
    compressor = byte_compressor(model, "pre", **PREDICTED)
    model.to(GPU)
    ids = random_ids(2, 170).to(GPU)
    settings = {"max_new_tokens": 90, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    texts = []
    for graphs in (False, True):
        with attach(model, compressor, graphs=graphs) as attached:
            texts.append(model.generate(ids, past_key_values=attached.new_cache(), **settings))
    assert (texts[0] == texts[1]).float().mean() > 0.9


def test_commands_run_a_model_there(tmp_path: Path) -> None:
    """Calibration with gradients and distillation, its evaluation, and what the CPU makes of it."""
    kl = calibrated_and_evaluated(tmp_path, GPU)
    assert kl == pytest.approx(calibrated_and_evaluated(tmp_path, "cpu"), rel=0.2)
