"""Our parallel layers against fairscale's own and against whole ones, in float64: outputs and gradients."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from fairscale.nn.model_parallel import layers as fairscale_layers
from ranks import RankPools
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama.config import ModelArgs
from llama.model import Transformer
from llama.parallel import groups, layers
from llama.parallel.partition import Partition, even_ranges
from llama.parallel.vocab import log_probs_of

CLOSE = {"atol": 1e-12, "rtol": 0.0}  # values and gradients below are of size 1 to 30
N_IN, N_OUT, VOCAB, DIM = 24, 36, 60, 12
Cuts = tuple[range, ...]
Results = dict[str, Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, BIAS, TABLE = randn(N_OUT, N_IN), randn(N_OUT, seed=1), randn(VOCAB, DIM, seed=2)
X, Y_GRAD, V_GRAD = randn(2, 5, N_IN, seed=3), randn(2, 5, N_OUT, seed=4), randn(2, 5, DIM, seed=5)
IDS = torch.randint(0, VOCAB, (2, 5), generator=torch.Generator().manual_seed(6))


def cut(x: Tensor, run: range, dim: int = -1) -> Tensor:
    return x.narrow(dim, run.start, len(run)).clone()


def backward_through(layer: nn.Module, x: Tensor, y_grad: Tensor) -> Results:
    """Output and gradients of one layer."""
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    y = layer(x)
    (y * y_grad).sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), **({"x": x.grad} if x.grad is not None else {}), **grads}


def fill(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    layer.double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


# -- what runs on every rank -----------------------------------------------------------------------


def column(module: Any, bias: bool, gather_output: bool, cuts: Cuts | None) -> Results:
    run, options = own_run(N_OUT, cuts)
    layer = module.ColumnParallelLinear(N_IN, N_OUT, bias=bias, gather_output=gather_output, **options)
    fill(layer, cut(WEIGHT, run, 0), cut(BIAS, run) if bias else None)
    return backward_through(layer, X, Y_GRAD if gather_output else cut(Y_GRAD, run))


def row(module: Any, bias: bool, input_is_parallel: bool, cuts: Cuts | None) -> Results:
    run, options = own_run(N_IN, cuts)
    layer = module.RowParallelLinear(N_IN, N_OUT, bias=bias, input_is_parallel=input_is_parallel, **options)
    fill(layer, cut(WEIGHT, run, 1), BIAS if bias else None)
    return backward_through(layer, cut(X, run) if input_is_parallel else X, Y_GRAD)


def embedding(module: Any, cuts: Cuts | None) -> Results:
    run, options = own_run(VOCAB, cuts)
    return backward_through(fill(module.VocabParallelEmbedding(VOCAB, DIM, **options), cut(TABLE, run, 0)), IDS, V_GRAD)


def own_run(total: int, cuts: Cuts | None) -> tuple[range, dict[str, Any]]:
    ranks = groups.current()
    run = (cuts or even_ranges(total, ranks.world_size))[ranks.rank]
    return run, ({} if cuts is None else {"cuts": cuts})


def by_both(function: Any, *args: Any) -> tuple[Results, Results]:
    return function(layers, *args, None), function(fairscale_layers, *args, None)


def by_ours(function: Any, *args: Any) -> Results:
    return function(layers, *args)


# -- against fairscale -----------------------------------------------------------------------------


def check_same(results: list[tuple[Results, Results]], names: set[str]) -> None:
    for ours, theirs in results:
        assert ours.keys() == theirs.keys() == names
        for name in names:
            torch.testing.assert_close(ours[name], theirs[name], **CLOSE)
            assert ours[name].abs().max() > 0.1


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("kind", [column, row])
def test_linears_equal_fairscales(pools: RankPools, kind: Any, flag: bool, bias: bool, world_size: int) -> None:
    check_same(pools.run(world_size, by_both, kind, bias, flag), {"y", "x", "weight"} | ({"bias"} if bias else set()))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_embedding_equals_fairscales(pools: RankPools, world_size: int) -> None:
    check_same(pools.run(world_size, by_both, embedding), {"y", "weight"})


# -- against whole layers --------------------------------------------------------------------------

# Even ones at 3 ranks, where the last block may be smaller, and uneven ones.
UNEVEN = [
    (2, (3, 1)),
    (3, (1, 1, 1)),
    (3, (1, 4, 2)),
    (4, (5, 1, 1, 3)),
]


def cuts_of(total: int, weights: tuple[int, ...]) -> Cuts:
    ends = [0, *(total * sum(weights[: i + 1]) // sum(weights) for i in range(len(weights)))]
    return tuple(range(start, stop) for start, stop in pairwise(ends))


def whole_linear(bias: bool) -> Results:
    linear = nn.Linear(N_IN, N_OUT, bias=bias)
    return backward_through(fill(linear, WEIGHT, BIAS if bias else None), X, Y_GRAD)


@pytest.mark.parametrize(("world_size", "weights"), UNEVEN)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gather_output", [True, False])
def test_uneven_column_linears_equal_the_whole_one(
    pools: RankPools, gather_output: bool, bias: bool, world_size: int, weights: tuple[int, ...]
) -> None:
    cuts, whole = cuts_of(N_OUT, weights), whole_linear(bias)
    for run, ours in zip(cuts, pools.run(world_size, by_ours, column, bias, gather_output, cuts), strict=True):
        torch.testing.assert_close(ours["y"], whole["y"] if gather_output else cut(whole["y"], run), **CLOSE)
        torch.testing.assert_close(ours["x"], whole["x"], **CLOSE)
        torch.testing.assert_close(ours["weight"], cut(whole["weight"], run, 0), **CLOSE)
        if bias:
            torch.testing.assert_close(ours["bias"], cut(whole["bias"], run), **CLOSE)


@pytest.mark.parametrize(("world_size", "weights"), UNEVEN)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("input_is_parallel", [True, False])
def test_uneven_row_linears_equal_the_whole_one(
    pools: RankPools, input_is_parallel: bool, bias: bool, world_size: int, weights: tuple[int, ...]
) -> None:
    cuts, whole = cuts_of(N_IN, weights), whole_linear(bias)
    for run, ours in zip(cuts, pools.run(world_size, by_ours, row, bias, input_is_parallel, cuts), strict=True):
        torch.testing.assert_close(ours["y"], whole["y"], **CLOSE)
        torch.testing.assert_close(ours["x"], cut(whole["x"], run) if input_is_parallel else whole["x"], **CLOSE)
        torch.testing.assert_close(ours["weight"], cut(whole["weight"], run, 1), **CLOSE)
        if bias:
            torch.testing.assert_close(ours["bias"], whole["bias"], **CLOSE)


@pytest.mark.parametrize(("world_size", "weights"), [(1, (1,)), *UNEVEN])
def test_uneven_embeddings_equal_the_whole_one(pools: RankPools, world_size: int, weights: tuple[int, ...]) -> None:
    cuts, whole = cuts_of(VOCAB, weights), backward_through(fill(nn.Embedding(VOCAB, DIM), TABLE), IDS, V_GRAD)
    for run, ours in zip(cuts, pools.run(world_size, by_ours, embedding, cuts), strict=True):
        torch.testing.assert_close(ours["y"], whole["y"], **CLOSE)
        torch.testing.assert_close(ours["weight"], cut(whole["weight"], run, 0), **CLOSE)


def test_rows_that_two_ranks_hold_count_in_both(pools: RankPools) -> None:
    """KV heads that several ranks serve: each computes its copy, and the gradients of x add up over all."""
    cuts = (range(0, 20), range(0, 20), range(20, 36))
    expected = whole_linear(False)
    twice = Y_GRAD.clone()
    twice[..., :20] *= 2
    for run, ours in zip(cuts, pools.run(3, by_ours, column, False, False, cuts), strict=True):
        torch.testing.assert_close(ours["y"], cut(expected["y"], run), **CLOSE)
        torch.testing.assert_close(ours["weight"], cut(expected["weight"], run, 0), **CLOSE)
        torch.testing.assert_close(ours["x"], twice @ WEIGHT, **CLOSE)


def sharded_log_probs(cuts: Cuts) -> Tensor:
    ranks = groups.current()
    logits, own = 20 * randn(2, 5, VOCAB, seed=8), cuts[groups.current().rank]
    return log_probs_of(cut(logits, own).float(), IDS, own, ranks)


@pytest.mark.parametrize(("world_size", "weights"), [(1, (1,)), *UNEVEN])
def test_log_probabilities_equal_those_of_the_whole_vocabulary(
    pools: RankPools, world_size: int, weights: tuple[int, ...]
) -> None:
    log_probs = (20 * randn(2, 5, VOCAB, seed=8)).log_softmax(-1)
    expected = log_probs.gather(-1, IDS.unsqueeze(-1)).squeeze(-1)
    for ours in pools.run(world_size, sharded_log_probs, cuts_of(VOCAB, weights)):
        torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=0.0)


# -- memory ----------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    n_values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.n_values = max(self.n_values, *made, 0)
        return out


BUILDS = {
    "ColumnParallelLinear": (N_IN, N_OUT),
    "RowParallelLinear": (N_IN, N_OUT),
    "VocabParallelEmbedding": (VOCAB, DIM),
}


def largest_while_building(by: str, name: str) -> tuple[tuple[int, ...], int, int]:
    """Shape of the weight, bytes behind it, and the largest tensor made on the way."""
    module = {"ours": layers, "fairscale": fairscale_layers}[by]
    with _Largest() as largest:
        layer = getattr(module, name)(*BUILDS[name], init_method=nn.init.zeros_)
    return tuple(layer.weight.shape), layer.weight.untyped_storage().nbytes(), largest.n_values


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", BUILDS)
def test_only_the_shard_is_ever_allocated(pools: RankPools, name: str, world_size: int) -> None:
    first, second = (VOCAB, DIM) if "Embedding" in name else (N_OUT, N_IN)
    shard = (first, second // world_size) if "Row" in name else (first // world_size, second)
    n_values = shard[0] * shard[1]
    assert pools.run(world_size, largest_while_building, "ours", name) == [(shard, 4 * n_values, n_values)] * world_size
    # The measure sees it where a layer does build the whole weight.
    for _, _, most in pools.run(world_size, largest_while_building, "fairscale", name):
        assert most == first * second


def test_without_an_init_method_nothing_is_filled_and_meta_allocates_nothing() -> None:
    layer = layers.ColumnParallelLinear(1 << 20, 1 << 20, bias=False, device="meta", dtype=torch.bfloat16)
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.bfloat16


# -- collectives and compilation -------------------------------------------------------------------

ARGS = ModelArgs(32, 3, 4, 2, vocab_size=96, ffn_dim=64)


class _Collectives(TorchDispatchMode):
    """Counts what is sent between ranks, whichever way it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def small_model(tensor_split: str | None = None) -> Transformer:
    """Random, and the same on every run; sharding is not the point here."""
    ranks = groups.current()
    model = Transformer(ARGS, Partition.create(ARGS, ranks.world_size, tensor_split), ranks)
    for seed, parameter in enumerate(model.parameters()):
        parameter.data.copy_(0.3 * randn(*parameter.shape, seed=seed))
    return model


def count_collectives() -> tuple[Counter[str], Counter[str]]:
    model, tokens = small_model(), IDS
    with _Collectives() as forward:
        loss = model(tokens).square().sum()
    with _Collectives() as backward:
        loss.backward()
    return forward.count, backward.count


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_forward_sums_twice_a_layer_and_once_for_the_embedding(pools: RankPools, world_size: int) -> None:
    """The backward sums twice a layer and once before the output; nothing else is sent."""
    expected = {"allreduce_": 2 * ARGS.n_layers + 1}
    assert pools.run(world_size, count_collectives) == [(expected, expected)] * world_size


def test_one_rank_sends_nothing() -> None:
    assert count_collectives() == ({}, {})


def compiled_and_eager(tensor_split: str | None) -> tuple[list[int], list[Results]]:
    """All-reduces in each captured graph; outputs and gradients, compiled and eager."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_compiler

    graphs: list[int] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(sum("all_reduce" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    backend = aot_autograd(fw_compiler=make_boxed_compiler(keep), bw_compiler=make_boxed_compiler(keep))
    model, results = small_model(tensor_split), []
    for run in (torch.compile(model, backend=backend, fullgraph=True), model):
        model.zero_grad()
        logits = run(IDS)
        logits.square().sum().backward()
        results.append({"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    torch._dynamo.reset()
    return graphs, results


@pytest.mark.parametrize(("world_size", "tensor_split"), [(1, None), (2, None), (2, "1,3")])
def test_forward_and_backward_compile_into_one_graph_each(
    pools: RankPools, world_size: int, tensor_split: str | None
) -> None:
    sums = 2 * ARGS.n_layers + 1 if world_size > 1 else 0
    for graphs, (compiled, eager) in pools.run(world_size, compiled_and_eager, tensor_split):
        assert graphs == [sums, sums]
        for name, value in eager.items():
            scale = value.abs().max()
            assert scale > 0
            # Eagerly, rotations have a backward of their own (llama.ops), which rounds in another order.
            torch.testing.assert_close(compiled[name] / scale, value / scale, atol=2e-6, rtol=0.0)
