"""Stats: counted once, read right, gone afterwards."""

import json
import sys

import pytest
import tiny_models
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from hf_sparse_attention import collect_stats, set_sparse_attention
from hf_sparse_attention.backends import reference
from hf_sparse_attention.stats import ATTRIBUTE, Stats
from hf_sparse_attention.types import AttentionCall, AttentionResult, BlockGeometry, SkipRule

GEOMETRY = BlockGeometry(16, 16)


def attention(q_len=96, kv_len=96, padding=0, lam=0.3):
    """A call that skips something, and its result."""
    q, k, v = 3 * torch.randn(3, 1, 4, kv_len, 8)
    valid = torch.ones(1, kv_len, dtype=torch.bool)
    valid[:, :padding] = False
    call = AttentionCall(q[:, :, -q_len:], k, v, scale=1.0, key_valid=valid)
    rule = SkipRule.blasst(lam)
    return call, reference.run(call, rule, BlockGeometry(16, 1), return_dropped_mass=True)


def fake(dropped, lse=None, counts=None):
    """A prefill call and a result with these certificates `[rows]`."""
    dropped = torch.tensor(dropped).reshape(1, 1, -1)
    lse = torch.zeros_like(dropped) if lse is None else torch.tensor(lse).reshape(dropped.shape)
    counts = torch.tensor([[[10, 4]]]) if counts is None else counts
    q = torch.zeros(1, 1, dropped.numel(), 1)
    return AttentionCall(q, q, q, scale=1.0), AttentionResult(q, lse, counts, dropped_mass=dropped)


def test_counts_add_up_by_phase_layer_and_head():
    stats = Stats()
    calls = {0: [attention(), attention()], 3: [attention()]}
    decode = attention(q_len=1)
    for layer, entries in calls.items():
        for call, result in entries:
            stats.record(layer, call, result, GEOMETRY)
    stats.record(0, *decode, GEOMETRY)
    for layer, entries in calls.items():
        expected = sum(result.counts[0] for _, result in entries)
        torch.testing.assert_close(stats.counts("prefill")[layer], expected)
    torch.testing.assert_close(stats.counts("decode")[0], decode[1].counts[0])
    total = sum(result.counts.sum((0, 1)) for entries in calls.values() for _, result in entries)
    assert stats.sparsity("prefill") == pytest.approx((total[1] / total[0]).item())
    both = total + decode[1].counts.sum((0, 1))
    assert stats.sparsity() == pytest.approx((both[1] / both[0]).item())
    assert 0 < stats.sparsity() < 1
    assert stats.layers == [0, 3]


def test_the_sketch_bounds_the_quantiles_from_above_and_keeps_the_exact_max():
    stats = Stats()
    values = torch.rand(4000).double() ** 6 * 0.9
    for part in values.float().split(500):
        stats.record(0, *fake(part.tolist()), GEOMETRY)
    found = stats.dropped_mass("prefill", 0)
    for name, q in (("p50", 0.5), ("p99", 0.99)):
        exact = values.quantile(q).item()
        assert exact <= found[name] <= exact * 1.16
    assert found["max"] == values.float().max().item()
    assert stats.dropped_mass("decode") is None
    assert stats.dropped_mass("prefill", 1) is None


def test_rows_that_see_no_key_are_no_evidence():
    stats = Stats()
    infinity = -torch.inf
    stats.record(0, *fake([0.0] * 90 + [0.5] * 10, lse=[infinity] * 90 + [1.0] * 10), GEOMETRY)
    assert stats.dropped_mass("prefill")["p50"] == pytest.approx(0.5, rel=0.16)
    padded = Stats()
    padded.record(0, *attention(padding=80), GEOMETRY)
    assert int(padded._sketches["prefill", 0].sum()) == 4 * 16


def test_nothing_dropped_reads_zero():
    stats = Stats()
    stats.record(0, *fake([0.0, 0.0]), GEOMETRY)
    assert stats.dropped_mass("prefill") == {"p50": 0.0, "p99": 0.0, "max": 0.0}


def test_empty_calls_and_results_without_counts():
    stats = Stats()
    call, result = fake([])
    stats.record(0, call, result, GEOMETRY)
    stats.record(1, call, AttentionResult(result.out), GEOMETRY)
    assert stats.layers == [0]
    assert stats.dropped_mass("prefill") is None


def test_dense_calls_are_counted_by_reason():
    stats = Stats()
    prefill, decode = attention()[0], attention(q_len=1)[0]
    for layer, call, reason in ((0, prefill, "short"), (0, prefill, "short"), (1, decode, "mask")):
        stats.record_dense(layer, call, reason)
    assert stats.dense() == {"short": 2, "mask": 1}
    assert stats.dense("prefill") == {"short": 2}
    assert stats.dense("decode", layer=0) == {}
    assert "dense in decode, 1 calls: mask" in stats.table()


def test_dict_is_json_and_table_shows_every_layer():
    stats = Stats()
    stats.record(0, *attention(), GEOMETRY)
    stats.record(12, *attention(q_len=2), GEOMETRY)
    stats.record_dense(12, attention()[0], "short")
    data = json.loads(json.dumps(stats.to_dict()))
    layer = data["prefill"]["layers"]["0"]
    assert len(layer["visited"]) == len(layer["skipped"]) == 4
    assert layer["sparsity"] == data["prefill"]["sparsity"] == stats.sparsity("prefill")
    assert set(layer["dropped_mass"]) == {"p50", "p99", "max"}
    assert data["prefill"]["layers"]["12"]["dense"] == {"short": 1}
    lines = stats.table().splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["prefill", "0"],
        ["prefill", "12"],
        ["decode", "12"],
    ]
    assert f"{stats.sparsity('prefill'):.1%}" in repr(stats)
    assert "nothing recorded" in repr(Stats())


def test_unknown_phase():
    with pytest.raises(ValueError, match=r"phase: expected one of .* got 'train'"):
        Stats().sparsity("train")


def test_plot(tmp_path):
    stats = Stats()
    with pytest.raises(ValueError, match="expected recorded attentions, got none"):
        stats.plot(tmp_path / "none.png")
    stats.record(0, *attention(), GEOMETRY)
    stats.record(2, *attention(), GEOMETRY)  # layer 1 is missing, and stays blank
    stats.record(0, *attention(q_len=1), GEOMETRY)
    stats.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-sparse-attention\[plots\]'"):
        Stats().plot(tmp_path / "map.png")


def test_the_attribute_comes_and_goes():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    with collect_stats(model, dropped_mass=False) as stats:
        assert all(getattr(module, ATTRIBUTE) is stats for module in model.modules())
        assert not stats.wants_dropped_mass
        with pytest.raises(RuntimeError, match="inside another"), collect_stats(model[0]):
            pass
        assert getattr(model[0], ATTRIBUTE) is stats
    assert not any(hasattr(module, ATTRIBUTE) for module in model.modules())
    with pytest.raises(KeyError), collect_stats(model):
        raise KeyError
    assert not any(hasattr(module, ATTRIBUTE) for module in model.modules())


def test_inference_mode_may_come_and_go():
    stats = Stats()
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            stats.record(0, *fake([0.5], counts=torch.tensor([[[10, 4]]])), GEOMETRY)
            stats.record_dense(0, fake([0.5])[0], "short")
    assert stats.counts("prefill")[0].tolist() == [[30, 12]]
    assert stats.dense() == {"short": 3}


def test_compiled_forwards_are_counted_without_recompiling():
    torch._dynamo.reset()
    model = torch.nn.Linear(1, 1)
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def forward(q, counts, dropped, lse):
        call = AttentionCall(q, q, q, scale=1.0)
        stats = getattr(model, ATTRIBUTE, None)
        if stats is not None:
            stats.record(0, call, AttentionResult(q, lse, counts, dropped_mass=dropped), GEOMETRY)
            stats.record_dense(1, call, "short")
        return q + 1

    expected = Stats()
    frames = []
    with collect_stats(model) as stats:
        for n in (20, 33, 47, 60, 71):
            dropped = torch.rand(1, 4, n)
            counts = torch.randint(0, 9, (1, 4, 2))
            q, lse = torch.randn(1, 4, n, 8), torch.zeros(1, 4, n)
            forward(q, counts, dropped, lse)
            call = AttentionCall(q, q, q, scale=1.0)
            expected.record(
                0, call, AttentionResult(q, lse, counts, dropped_mass=dropped), GEOMETRY
            )
            expected.record_dense(1, call, "short")
            frames.append(counter.frame_count)
    assert stats.to_dict() == expected.to_dict()
    assert frames[1:] == [2] * 4, "one graph makes the counters, one adds to them"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_is_not_counted_again(reentrant):
    stats = Stats()
    runs = []

    def layer(x):
        runs.append(1)
        call = AttentionCall(x, x, x, scale=1.0)
        result = reference.run(call, SkipRule.budget(0.5), GEOMETRY)
        stats.record(0, call, result, GEOMETRY)
        stats.record_dense(0, call, "short")
        return result.out.transpose(1, 2)

    x = torch.randn(1, 2, 64, 8, requires_grad=True)
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert len(runs) == 2
    once = stats.counts("prefill")[0]
    assert stats.dense() == {"short": 1}
    layer(x.detach())
    torch.testing.assert_close(stats.counts("prefill")[0], 2 * once)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_in_training(checkpointing):
    """Through transformers, whose checkpointing wraps whole layers; and without an effect on it."""
    model = tiny_models.llama().train()
    set_sparse_attention(model, "blasst", max_dropped_mass=0.5, min_length=0, backend="reference")
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = torch.randint(3, tiny_models.VOCABULARY, (2, 200))
    plain = model(input_ids=ids, labels=ids).loss
    with collect_stats(model) as stats:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    torch.testing.assert_close(loss, plain)
    for counts in stats.counts("prefill").values():
        # 4 block rows see 1 to 4 blocks; twice, for the batch.
        assert counts[:, 0].tolist() == [2 * (1 + 2 + 3 + 4)] * 4
    assert sorted(stats.counts("prefill")) == [0, 1]
    assert stats.dense() == {}
