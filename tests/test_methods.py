"""Settings and a call in, the right rule out: lengths, positions, padding, compile."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hf_sparse_attention.backends import reference
from hf_sparse_attention.config import METHOD_NAMES, SparseAttentionConfig
from hf_sparse_attention.methods import DEFAULT_MAX_DROPPED_MASS, METHODS
from hf_sparse_attention.thresholds import Thresholds
from hf_sparse_attention.types import LARGEST_LAMBDA, PHASES, AttentionCall, BlockGeometry, SkipRule

GEOMETRY = BlockGeometry(16, 16)


def attention_call(q_len, kv_len, batch=1, heads=4, kv_heads=2, spread=1.0, **settings):
    q = spread * torch.randn(batch, heads, q_len, 8)
    k, v = torch.randn(2, batch, kv_heads, kv_len, 8)
    return AttentionCall(q, k, v, scale=1.0, **settings)


def left_padded(batch, kv_len, paddings):
    valid = torch.ones(batch, kv_len, dtype=torch.bool)
    for row, n in zip(valid, paddings, strict=True):
        row[:n] = False
    return valid


def tables(levels=(2, 4), layers=3, heads=4, blocks=5, around=0.0, geometry=GEOMETRY, **settings):
    shape = len(levels), layers, heads, blocks
    tensors = {f"{geometry.name}.{p}.T": around + torch.randn(shape) for p in PHASES}
    return Thresholds(tensors, {geometry.name: geometry}, list(levels), **settings)


def bsfa(thresholds, **settings):
    return SparseAttentionConfig(method="bsfa", tables=thresholds, **settings)


def rule_of(config, call, layer=0) -> SkipRule:
    method = METHODS[config.method]
    return method.rule(config, layer, call, method.geometries(config)[0])


def test_every_name_has_a_method():
    assert tuple(METHODS) == METHOD_NAMES
    assert all(name == method.name for name, method in METHODS.items())


# BLASST: lambda = scale_factor / L


@pytest.mark.parametrize(
    ("q_len", "kv_len", "settings", "lengths"),
    [
        pytest.param(96, 96, {}, [96, 96], id="prefill"),
        pytest.param(32, 96, {}, [96, 96], id="chunk"),
        pytest.param(1, 96, {}, [96, 96], id="decode"),
        pytest.param(
            96, 96, {"key_valid": left_padded(2, 96, [30, 0])}, [66, 96], id="left-padding"
        ),
        pytest.param(
            96, 96, {"key_valid": left_padded(2, 96, [30, 0]).flip(1)}, [66, 96], id="right-padding"
        ),
        pytest.param(32, 96, {"q_offset": torch.tensor([10])}, [42, 42], id="static-cache"),
        pytest.param(32, 96, {"q_offset": torch.tensor([80])}, [96, 96], id="past-the-cache"),
        pytest.param(
            32,
            96,
            {"q_offset": torch.tensor([10, 20]), "key_valid": left_padded(2, 96, [5, 0])},
            [37, 52],
            id="static-cache-padded",
        ),
        pytest.param(96, 96, {"window": 20}, [20, 20], id="window"),
        pytest.param(
            96,
            96,
            {"window": 80, "key_valid": left_padded(2, 96, [30, 0])},
            [66, 80],
            id="window-padded",
        ),
        pytest.param(32, 96, {"causal": False}, [96, 96], id="bidirectional"),
        pytest.param(
            32,
            96,
            {"causal": False, "q_offset": torch.tensor([10])},
            [96, 96],
            id="bidirectional-offset",
        ),
    ],
)
def test_lambda_is_the_factor_over_the_keys_in_reach(q_len, kv_len, settings, lengths):
    config = SparseAttentionConfig(threshold_scale_factor={"prefill": 3.0, "decode": 2.0})
    call = attention_call(q_len, kv_len, batch=2, **settings)
    log_lambda = rule_of(config, call).log_lambda
    factor = {"prefill": 3.0, "decode": 2.0}[call.phase]
    expected = torch.tensor([factor / n for n in lengths])
    torch.testing.assert_close(log_lambda.exp().expand(2, 1)[:, 0], expected)


def test_a_request_without_keys_has_a_lambda_all_the_same():
    call = attention_call(9, 9, key_valid=torch.zeros(1, 9, dtype=torch.bool))
    rule = rule_of(SparseAttentionConfig(threshold_scale_factor=3.0), call)
    assert -torch.inf < rule.log_lambda.item() < 0


def test_target_sparsity_moves_lambda_along_the_fit():
    config = SparseAttentionConfig(
        threshold_scale_factor={"prefill": {"a": 2.0, "b": 5.0}}, target_sparsity={"prefill": 0.4}
    )
    log_lambda = rule_of(config, attention_call(96, 96)).log_lambda
    expected = 2.0 * torch.tensor(5.0 * 0.4).exp() / 96
    torch.testing.assert_close(log_lambda.exp(), expected.reshape(1, 1))


def test_lambda_stays_below_one_and_zero_never_skips():
    huge = SparseAttentionConfig(threshold_scale_factor=1e30)
    log_lambda = rule_of(huge, attention_call(32, 32)).log_lambda
    assert log_lambda.item() == torch.tensor(LARGEST_LAMBDA).log().item() < 0
    never = SparseAttentionConfig(threshold_scale_factor=0)
    call = attention_call(96, 96, spread=20.0)
    assert reference.run(call, rule_of(never, call), GEOMETRY).counts[..., 1].sum() == 0


@pytest.mark.parametrize("window", [None, 50], ids=["full", "window"])
@pytest.mark.parametrize("q_len", [128, 1], ids=["prefill", "decode"])
def test_no_row_drops_more_than_the_scale_factor(q_len, window):
    """The bound that the docstring promises, with padding; the dense lse knows the true mass."""
    config = SparseAttentionConfig(threshold_scale_factor=0.5)
    call = attention_call(
        q_len, 128, batch=2, spread=6.0, window=window, key_valid=left_padded(2, 128, [40, 0])
    )
    # A block that is skipped must be there, or nothing is tested.
    sparse = reference.run(call, rule_of(config, call), BlockGeometry(16, 1))
    assert sparse.counts[..., 1].sum() > 0
    dense = reference.run(call, SkipRule.never(), BlockGeometry(16, 1))
    rows = dense.lse > -torch.inf
    dropped = 1 - (sparse.lse - dense.lse)[rows].double().exp()
    assert dropped.max() <= 0.5


def test_a_phase_without_calibration_runs_the_default_budget_and_says_so():
    config = SparseAttentionConfig(threshold_scale_factor={"prefill": 3.0})
    prefill = rule_of(config, attention_call(96, 96))
    assert prefill.max_dropped_mass is None
    decode = rule_of(config, attention_call(1, 96))
    assert decode.log_lambda is None
    assert decode.max_dropped_mass.item() == pytest.approx(DEFAULT_MAX_DROPPED_MASS)
    (note,) = METHODS["blasst"].notes(config)
    assert "decode" in note
    assert "prefill" not in note
    assert "calibrate(model, data, method='blasst')" in note


def test_a_budget_joins_the_threshold_of_its_phase_only():
    config = SparseAttentionConfig(threshold_scale_factor=3.0, max_dropped_mass={"prefill": 0.25})
    prefill, decode = (rule_of(config, attention_call(n, 96)) for n in (96, 1))
    assert prefill.max_dropped_mass.item() == 0.25
    assert prefill.log_lambda is not None
    assert decode.max_dropped_mass is None
    assert METHODS["blasst"].notes(config) == []


def test_a_fit_without_its_target_is_refused():
    config = SparseAttentionConfig(threshold_scale_factor={"decode": {"a": 2.0, "b": 5.0}})
    with pytest.raises(ValueError, match=r"target_sparsity: expected .* for decode"):
        METHODS["blasst"].check(config)


# BSFA: T by layer, head and position


@pytest.mark.parametrize("level", [2, 4, None])
@pytest.mark.parametrize("layer", [0, 2])
def test_thresholds_are_those_of_level_layer_head_and_block(level, layer):
    thresholds = tables()
    call = attention_call(70, 70, heads=3, kv_heads=3)
    rule = rule_of(bsfa(thresholds, level=level), call, layer)
    row = 0 if level == 2 else 1  # None: the largest k
    torch.testing.assert_close(
        rule.block_threshold[0], thresholds.table("16x16", "prefill")[row, layer, :3]
    )
    assert rule.keep_sink


@pytest.mark.parametrize(
    ("q_len", "kv_len", "settings", "blocks"),
    [
        pytest.param(100, 100, {}, [[0, 1, 2, 3, 4, 4, 4]], id="reuse-the-last"),
        pytest.param(32, 64, {}, [[2, 3]], id="chunk"),
        pytest.param(32, 60, {}, [[1, 2]], id="chunk-between-blocks"),
        pytest.param(32, 128, {"q_offset": torch.tensor([16])}, [[1, 2]], id="static-cache"),
        pytest.param(
            64,
            64,
            {"key_valid": left_padded(2, 64, [20, 0])},
            [[0, 1, 2, 3], [0, 1, 2, 3]],
            id="left-padding",
        ),
        pytest.param(
            16,
            64,
            {"key_valid": left_padded(2, 64, [20, 0])},
            [[1], [3]],
            id="chunk-left-padding",
        ),
        pytest.param(3, 50, {}, [[2, 3, 3]], id="decode"),
        pytest.param(
            2, 50, {"key_valid": left_padded(2, 50, [17, 0])}, [[1, 2], [3, 3]], id="decode-padded"
        ),
    ],
)
def test_positions_are_the_requests_own(q_len, kv_len, settings, blocks):
    thresholds = tables()
    call = attention_call(q_len, kv_len, batch=len(blocks), **settings)
    threshold = rule_of(bsfa(thresholds, level=4), call, layer=1).block_threshold
    table = thresholds.table("16x16", call.phase)[1, 1]
    torch.testing.assert_close(threshold, torch.stack([table[:, row] for row in blocks]))


def test_a_padded_request_decides_as_it_would_alone():
    thresholds = tables(blocks=8, around=16.0)
    config = bsfa(thresholds)
    call = attention_call(96, 96, batch=2, spread=2.0, key_valid=left_padded(2, 96, [37, 0]))
    padded = reference.run(call, rule_of(config, call), GEOMETRY)
    alone = AttentionCall(call.q[:1, :, 37:], call.k[:1, :, 37:], call.v[:1, :, 37:], scale=1.0)
    expected = reference.run(alone, rule_of(config, alone), GEOMETRY)
    assert 0 < expected.counts[..., 1].sum() < expected.counts[..., 0].sum() / 2
    torch.testing.assert_close(padded.counts[:1], expected.counts)
    torch.testing.assert_close(padded.out[:1, 37:], expected.out)


def test_prefill_thresholds_leave_decoding_exact_and_say_so():
    thresholds = tables()
    del thresholds.tensors["16x16.decode.T"]
    config = bsfa(thresholds)
    assert rule_of(config, attention_call(1, 64)).is_never
    assert "decod" in METHODS["bsfa"].notes(config)[0]
    budgeted = bsfa(thresholds, max_dropped_mass={"decode": 0.1})
    assert rule_of(budgeted, attention_call(1, 64)).max_dropped_mass.item() == pytest.approx(0.1)
    assert METHODS["bsfa"].notes(budgeted) == []


def test_keep_sink_reaches_the_rule():
    config = bsfa(tables(keep_sink=False), keep_sink=False)
    assert not rule_of(config, attention_call(64, 64)).keep_sink


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(
            lambda: SparseAttentionConfig(method="bsfa"),
            r"got none.*calibrate\(model, data, method='bsfa'\)",
            id="missing",
        ),
        pytest.param(
            lambda: SparseAttentionConfig(
                method="bsfa", thresholds_file={"name": "t.safetensors", "sha256": "0"}
            ),
            r"t\.safetensors.*load_thresholds",
            id="not-loaded",
        ),
        pytest.param(
            lambda: replace(bsfa(tables()), geometry=BlockGeometry(64, 128)),
            "expected 16x16.*got 64x128",
            id="geometry",
        ),
        pytest.param(
            lambda: replace(bsfa(tables()), geometry=BlockGeometry(16, 16, "ascending")),
            "expected 16x16 .sink_diagonal.*got 16x16 .ascending",
            id="order",
        ),
        pytest.param(
            lambda: bsfa(tables(), keep_sink=False), "expected True.*got False", id="sink"
        ),
    ],
)
def test_bsfa_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        METHODS["bsfa"].check(config())
    with pytest.raises(ValueError, match=message):
        rule_of(config(), attention_call(64, 64))


def test_a_foreign_shape_is_refused():
    with pytest.raises(ValueError, match=r"layer 3 with 4 heads.*3 layers with 4 heads"):
        rule_of(bsfa(tables()), attention_call(64, 64), layer=3)
    with pytest.raises(ValueError, match="layer -4 with 4 heads"):
        rule_of(bsfa(tables()), attention_call(64, 64), layer=-4)
    with pytest.raises(ValueError, match=r"8 heads.*with 4 heads"):
        rule_of(bsfa(tables()), attention_call(64, 64, heads=8))


# Compiled forwards


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_rules_compile_once_for_all_values_and_lengths(name):
    thresholds = tables()
    configs = {
        "blasst": [
            SparseAttentionConfig(threshold_scale_factor=x, max_dropped_mass={"prefill": x})
            for x in (1.0, 2.0)
        ],
        "bsfa": [bsfa(thresholds, level=k) for k in (4, 2)],
    }[name]
    torch._dynamo.reset()  # the graphs belong to the code, which the test cases share
    holder = torch.nn.Module()
    counter = CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(q, k, valid, offset):
        call = AttentionCall(q, k, k, scale=1.0, key_valid=valid, q_offset=offset, window=300)
        rule = METHODS[name].rule(holder.config, 1, call, GEOMETRY)
        return rule.log_lambda, rule.block_threshold, rule.max_dropped_mass

    for n in (48, 70, 91):
        for config in configs:
            METHODS[name].prepare(config, torch.device("cpu"), GEOMETRY)
            holder.config = config
            call = attention_call(n, n + 20, batch=2, key_valid=left_padded(2, n + 20, [9, 0]))
            call = replace(call, q_offset=torch.tensor([20]), window=300)
            rule = METHODS[name].rule(config, 1, call, GEOMETRY)
            expected = (rule.log_lambda, rule.block_threshold, rule.max_dropped_mass)
            actual = compiled(call.q, call.k, call.key_valid, call.q_offset)
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_a_levels_table_starts_its_own_storage():
    """torch.compile may guard on a view's offset, and recompile for another level."""
    thresholds = tables()
    for level in (2, 4):
        config = bsfa(thresholds, level=level)
        prepared = METHODS["bsfa"].prepare(config, torch.device("cpu"), GEOMETRY)
        assert prepared["prefill.threshold"].storage_offset() == 0
        assert prepared["decode.threshold"].storage_offset() == 0
