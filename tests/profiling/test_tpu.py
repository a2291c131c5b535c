"""Cycles added up along the flow of control of a program's text, and what has none."""

import types

import pytest

from coda_jax.profiling import topology, tpu

V5E = tpu.CHIPS["v5e"]
# 7 rounds of 100 cycles, the dearer of two branches (60), 10 of its own; a copy of 8 MiB is waited
# for, of which 770 cycles are under other work; 100 rows of 128 bfloat16 numbers are gathered.
PROGRAM = """\
HloModule jit_f

%body (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %work.1 = f32[8]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(f)/layers_0/mlp/dot"}, backend_config={"estimated_cycles":"100"}
}

%condition (p: (s32[])) -> pred[] {
  %p = (s32[]) parameter(0)
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%unknown (p: (s32[])) -> pred[] {
  ROOT %any = pred[] fusion(%p), kind=kLoop
}

%small (p: f32[8]) -> f32[8] {
  %work.2 = f32[8]{0} fusion(%p), kind=kLoop, metadata={op_name="a"}, backend_config={"estimated_cycles":"20"}
}

%large (p: f32[8]) -> f32[8] {
  %work.3 = f32[8]{0} fusion(%p), kind=kLoop, metadata={op_name="b"}, backend_config={"estimated_cycles":"60"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %copy-start.1 = (bf16[4194304]{0:S(1)}, bf16[4194304]{0}, u32[]{:S(2)}) copy-start(%x)
  %while.1 = (s32[]) while(%x), condition=%condition, body=%body
  %branch.1 = f32[8]{0} conditional(%x), true_computation=%small, false_computation=%large
  %work.4 = f32[8]{0} fusion(%x), kind=kLoop, metadata={op_name="c"}, backend_config={"estimated_cycles":"10"}
  %copy-done.1 = bf16[4194304]{0:S(1)} copy-done(%copy-start.1)
  %rows = bf16[100,128]{1,0} fusion(%x), kind=kCustom, metadata={op_name="jit(f)/layers_0/gather/gather"}
  %sum = f32[1000]{0} all-reduce(%x), to_apply=%small, metadata={op_name="d"}, backend_config={"estimated_cycles":"5"}
}
"""  # noqa: E501


def compiled(text):
    return types.SimpleNamespace(as_text=lambda: text)


@pytest.mark.parametrize("counter", ["s32", "u32"])
def test_cycles_follow_the_flow_of_control(counter):
    cost = tpu.cost(compiled(PROGRAM.replace("%limit = s32", f"%limit = {counter}")), V5E)
    gathered = 100 * 8 + 500  # 8 cycles a row: more than reading and writing their bytes takes
    copied = 2**23 / V5E.bytes_a_cycle
    assert cost.cycles["jit(f)/layers_0/mlp/dot"] == 700
    assert cost.cycles["b"] == 60 and "a" not in cost.cycles
    assert cost.cycles[tpu.WAITING] == pytest.approx(copied - 770)
    assert dict(cost.guessed) == {"jit(f)/layers_0/gather/gather": gathered}
    assert cost.total == pytest.approx(copied + gathered + 5)
    assert cost.guessed_share == pytest.approx(gathered / cost.total)
    assert not cost.loops


def test_a_loop_of_unknown_length_is_named_and_counts_as_is_said():
    text = PROGRAM.replace("condition=%condition", "condition=%unknown")
    cost = tpu.cost(compiled(text), V5E)
    assert cost.cycles["jit(f)/layers_0/mlp/dot"] == 100
    assert cost.loops == {"": 100}
    scope = "jit(f)/at_most_3_steps/while"
    said = text.replace("condition=%unknown", f'condition=%unknown, metadata={{op_name="{scope}"}}')
    cost = tpu.cost(compiled(said), V5E)
    assert cost.cycles["jit(f)/layers_0/mlp/dot"] == 300
    assert cost.loops == {scope: 100}


def test_what_chips_send_is_counted_in_arrays_as_they_come_out():
    """Also what a loop repeats, a fusion hides, or runs beside other work."""
    sent = """\
  %gather-start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), metadata={op_name="e"}
  %gather-done = bf16[16,8]{1,0} all-gather-done(%gather-start), metadata={op_name="e"}
  %hidden = f32[8]{0} fusion(%x), kind=kCustom, calls=%small, metadata={op_name="f"}
  %part = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="i"}
  %one-start = f32[5]{0} all-to-all(%x), channel_id=7, metadata={op_name="h"}
  %one-done = f32[5]{0} all-to-all(%x), channel_id=7, metadata={op_name="h"}
  %both = (f32[2]{0}, s32[3]{0}) all-reduce(%x, %y), to_apply=%small, metadata={op_name="d"}
"""
    inner = '  %inner = f32[8]{0} reduce-scatter(%p), metadata={op_name="g"}\n'
    text = PROGRAM.replace("  %sum = ", f"{sent}  %sum = ")
    for computation in ("%small (p: f32[8]) -> f32[8] {", "%body (p: (s32[])) -> (s32[]) {"):
        text = text.replace(f"{computation}\n", f"{computation}\n{inner}")
    cost = tpu.cost(compiled(text), V5E)
    assert cost.collectives == {
        ("all-reduce", "d"): 2,
        ("all-gather", "e"): 1,
        ("reduce-scatter", "g"): 7 + 1,
        ("all-to-all", "h"): 1,
        ("reduce-scatter", "i"): 1,
    }
    assert cost.collective_bytes == {
        ("all-reduce", "d"): 4000 + 20,
        ("all-gather", "e"): 16 * 8 * 2,
        ("reduce-scatter", "g"): 32 * (7 + 1),
        ("all-to-all", "h"): 20,
        ("reduce-scatter", "i"): 8,
    }


def test_a_program_for_another_machine_is_refused():
    with pytest.raises(ValueError, match="not compiled for a TPU"):
        tpu.cost(compiled("HloModule jit_f"), V5E)


@pytest.mark.parametrize("text", ["v5e", "v7:2x2", "v5e:2", "v5e:2x2x", ""])
def test_a_topology_is_a_chip_and_a_shape(text):
    with pytest.raises(ValueError, match="such as v5e:2x2"):
        topology.checked(text)


def test_without_libtpu_the_error_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'coda_jax\[tpu\]'"):
        topology.chips("v5e:2x2")
