"""Planning: topologies, reading a compiled program, and plans of tiny steps."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import plan as plans
from configs import vito
from helpers.commands import one_device, run_module
from vivi_jax.build import build
from vivi_jax.distributed import sharding
from vivi_jax.errors import ConfigError
from vivi_jax.planning import chips, hlo, planner, work
from vivi_jax.train_step import create

TINY = [
    "--config=configs/vito.py:demo,views=2",
    "--config.encoder.width=0.125",
    "--config.data.image_size=32",
    "--config.method.projector_hidden=16",
    "--config.method.attention_hidden=8",
]


def test_topologies_have_the_devices_of_their_chips():
    devices = {
        name: chips.parse_topology(name).devices
        for name in ("v3:2x2", "v3:8x8", "v3:16x32", "v4:2x2x4", "v5e:16x16", "v6e:2x4", "gpu:h100x64")
    }
    assert list(devices.values()) == [8, 128, 1024, 16, 256, 8, 64]


@pytest.mark.parametrize(
    "name, known",
    [
        ("v3:8x9", "v3 has 2x2, 4x4"),
        ("v9:2x2", "v3:2x2 to 32x32"),
        ("gpu:p4x8", "a100, h100, h200"),
        ("gpu:h100", "gpu:NAMExN"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused_with_those_that_do(name, known):
    with pytest.raises(ConfigError, match="does not exist") as error:
        chips.parse_topology(name)
    assert known in str(error.value)


def test_collectives_are_counted_as_often_as_their_loop_runs():
    """Per device: a gather of 8 x 16 floats, and in a loop of five an all-reduce of 16 floats."""
    mesh = sharding.make_mesh(jax.devices()[:8])
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def step(x, y):
        total = jax.lax.fori_loop(0, 5, lambda i, t: t + jnp.tanh(x * t[None]).sum(axis=0), jnp.zeros(16))
        return total, jax.lax.with_sharding_constraint(y, whole)

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    program = hlo.read(jax.jit(step, in_shardings=split).lower(x, x).compile().as_text())
    found = {c.operation: (c.operations, c.bytes, c.dtype) for c in program.collectives}
    assert found == {"all-reduce": (5, 5 * 16 * 4, "f32"), "all-gather": (1, 8 * 16 * 4, "f32")}


def counted(function, *shapes) -> tuple[float, float]:
    """FLOPs and bytes of a program: the compiler's figures, and what its loops repeat."""
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    cost, repeated = compiled.cost_analysis(), work.of_repetitions(compiled.as_text())
    return cost["flops"] + repeated.flops, cost["bytes accessed"] + repeated.bytes


@pytest.mark.parametrize("trips", [1, 2, 9])
def test_work_in_a_loop_is_counted_as_often_as_it_runs(trips):
    """Products of [64, 256] and [256, 128], each of another slice of an array: 2 m k n operations."""

    def step(x, w):
        return jax.lax.scan(lambda total, x: (total + (x @ w).sum(), None), jnp.zeros(()), x)[0]

    flops, moved = counted(step, (trips, 64, 256), (256, 128))
    assert trips * 2 * 64 * 256 * 128 <= flops < 1.01 * trips * 2 * 64 * 256 * 128
    assert trips * 4 * (64 * 256 + 256 * 128) <= moved < trips * 4 * (2 * 64 * 256 + 256 * 128 + 6 * 64 * 128)


def test_loops_in_loops_multiply():
    def step(x, w):
        inner = lambda x, _: (x @ w, None)  # noqa: E731
        return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, length=5)[0], None), x, length=3)[0]

    flops, _ = counted(step, (64, 64), (64, 64))
    assert 15 * 2 * 64**3 <= flops < 1.01 * 15 * 2 * 64**3


def test_of_branches_in_a_loop_the_most_costly_counts():
    def step(x, w):
        def pass_(x, i):
            return jax.lax.cond(i % 2 == 0, lambda x: x @ w, lambda x: x @ w @ w, x), None

        return jax.lax.scan(pass_, x, jnp.arange(5))[0]

    flops, _ = counted(step, (64, 64), (64, 64))
    assert 5 * 4 * 64**3 <= flops < 1.01 * 5 * 4 * 64**3


@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 4)])
def test_work_is_counted_as_the_compiler_counts_it(stride, dilation, groups):
    """A padded convolution and its gradients, with a product behind it, where there is no loop."""

    def loss(kernel, w, x):
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return jnp.square(jax.nn.relu(y) @ w).sum()

    shapes = (3, 3, 16 // groups, 32), (32, 8), (4, 15, 15, 16)
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
    cost, found = compiled.cost_analysis(), work.of_program(compiled.as_text())
    assert found.flops == pytest.approx(cost["flops"], rel=0.02)
    assert found.bytes == pytest.approx(cost["bytes accessed"], rel=0.02)
    assert work.of_repetitions(compiled.as_text()) == (0, 0)


@pytest.mark.slow
def test_micro_batches_take_more_work_and_not_less():
    """They embed every example twice, once without its gradient: about four thirds of the work of one batch."""
    flops = {}
    for micro_batches in (1, 4):
        config = vito.get_config("demo")
        config.update(dict(batch_size=16, micro_batches=micro_batches))
        config.data.image_size, config.encoder.width = 32, 0.125
        experiment = build(config)
        state = jax.eval_shape(lambda e=experiment: create(e.method, e.optimizer, e.batch_spec, 0))
        mesh = sharding.make_mesh(jax.devices()[:1])
        result = planner.compile_for(chips.parse_topology("gpu:h100x1"), mesh, experiment, state)
        flops[micro_batches] = result["flops"]
        assert result["estimate"]["examples_per_second"] > 0
    assert 1.1 < flops[4] / flops[1] < 1.6, flops


def test_collectives_that_the_tpus_compiler_takes_apart_are_counted():
    """As it writes them: a ring in a loop that counts by two to eight, and a gather that spans several fusions."""
    program = hlo.read("""
%fused.1 (p: bf16[1,15]) -> (bf16[1,15], bf16[16,15], u32[]) {
  %all-gather.1 = bf16[16,15]{1,0} all-gather(%p), metadata={op_name="jit(step)/jvp()/dot"}
  ROOT %custom-call.1 = (bf16[1,15]{1,0}, bf16[16,15]{1,0}, u32[]) custom-call(%all-gather.1)
}
%fused.2 (p: bf16[16,15]) -> bf16[16,15] {
  ROOT %all-gather.2 = bf16[16,15]{1,0} all-gather(%p), metadata={op_name="jit(step)/jvp()/dot"}
}
%cond (state.1: (f32[15], u32[])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=1
  ROOT %less = pred[] compare(%counter.1, %eight), direction=LT
}
%body (state.2: (f32[15], u32[])) -> (f32[15], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %counter.2 = u32[]{:T(128)} get-tuple-element(%state.2), index=1
  %sent = (f32[15]{0}, f32[15]{0}, u32[], u32[]) collective-permute-start(%x), metadata={op_name="transpose(jvp())"}
  %arrived = f32[15]{0} collective-permute-done(%sent)
  %next = u32[]{:T(128)} add(%counter.2, %two)
  ROOT %tuple = (f32[15]{0}, u32[]{:T(128)}) tuple(%arrived, /*index=1*/%next)
}
ENTRY %main (x: bf16[1,15]) -> f32[15] {
  %async-collective-start = (bf16[1,15], bf16[16,15], u32[]) fusion(%x), kind=kCustom, calls=%fused.1
  %carry = bf16[16,15] fusion(%async-collective-start), kind=kCustom, calls=%fused.2
  %while.1 = (f32[15], u32[]) while(%init), condition=%cond, body=%body
}
""")
    found = {(c.operation, c.origin): (c.operations, c.bytes, c.dtype) for c in program.collectives}
    assert found == {
        ("all-gather", "forward"): (1, 16 * 15 * 2, "bf16"),
        ("collective-permute", "backward"): (4, 4 * 15 * 4, "f32"),
    }


@pytest.mark.parametrize(
    "groups, group",
    [
        ("mesh['axis_0'=8,'axis_1'=1] {'axis_0'}", 0),  # all
        ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=1] {'axis_1','axis_2'}", 4),  # 0-3 and 4-7
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=3] {'axis_1','axis_2'}", 6),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}", 0),  # 0 and 4: no neighbours
        ("mesh['axis_0'=2,'axis_1'=4,'axis_2'=2] {'axis_0','axis_1'}", 0),
        ("{{0,1},{2,3}}", 0),
    ],
)
def test_neighbours_that_sum_among_themselves_are_told_apart(groups, group):
    program = hlo.read(f"""
ENTRY %main (x: f32[15]) -> f32[15] {{
  ROOT %sum = f32[15] all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add
}}
""")
    assert program.collectives == [hlo.Collective("all-reduce", "update", "f32", group, 1, 60)]


def test_messages_wait_for_the_farthest_chip():
    """Half way round a ring; from end to end of a part of one."""
    hop = chips.HOP_SECONDS
    assert hop * 32 == chips.parse_topology("v3:32x32").message_seconds((32, 32, 1))
    assert hop * (16 + 1) == chips.parse_topology("v3:32x32").message_seconds((32, 2, 1))
    assert hop * (1 + 1 + 2) == chips.parse_topology("v4:2x2x4").message_seconds((2, 2, 4))
    assert chips.parse_topology("gpu:h100x8").message_seconds(()) == chips.GPU_SECONDS


@pytest.mark.slow
def test_the_compiler_has_the_devices_we_count():
    """In a process of its own, of which the TPU compiler's library is a part: a small topology of each kind."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no TPU compiler here; pip install -e .[plan] to run this test")
    code = (
        "from vivi_jax.distributed import sharding\n"
        "from vivi_jax.planning import chips, planner as plan\n"
        "for kind, shapes in chips.TOPOLOGIES.items():\n"
        "    topology = chips.parse_topology(f'{kind}:{shapes[1]}')\n"
        "    mesh = sharding.make_mesh(plan.devices(topology))\n"
        "    whole = plan.extent(mesh, 0)[:len(topology.shape)] == topology.shape\n"
        "    print(kind, mesh.size - topology.devices, whole, *plan.extent(mesh, topology.chip.devices_per_chip))"
    )
    found = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=300, env=one_device())
    assert found.stdout.splitlines() == [f"{kind} 0 True 1 1 1" for kind in chips.TOPOLOGIES], found.stderr


def run_plan(topology: str, *flags: str) -> subprocess.CompletedProcess:
    return run_module("vivi_jax.plan", f"--topology={topology}", *TINY, *flags)


@pytest.mark.slow
def test_a_plan_for_gpus_sends_no_more_than_it_must(tmp_path):
    path = tmp_path / "plan.json"
    result = run_plan("gpu:h100x4", f"--json={path}")
    assert result.returncode == 0 and "ESTIMATE" in result.stdout and ": fits (" in result.stdout, result.stderr
    plan = json.loads(path.read_text())
    assert plan["devices"] == 4 and plan["batch"] == 64
    assert plan["memory"]["state_and_batch"] > 64 // 4 * 2 * 32 * 32 * 3
    # Above the least: the CPU's compiler sums the gradients of the two views over the devices apart.
    assert 0.95 < plan["collective_bytes"] / sum(plan["collective_bytes_minimum"].values()) < 2.2
    name = plans.key("configs/vito.py:demo", "gpu:h100x4", ["--config.batch_size=64"])
    assert f"| vito.py:demo batch_size=64 | gpu:h100x4 | 4 | 64 | {plan['memory_total'] / 1e9:.1f} of" in plans.table(
        {name: plan | {"commit": "0123456789"}}
    )


@pytest.mark.slow
def test_a_plan_for_a_tpu_has_the_compilers_cycles(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no TPU compiler here; pip install -e .[plan] to run this test")
    path = tmp_path / "plan.json"
    result = run_plan("v3:2x2", f"--json={path}", "--config.encoder.dtype=bfloat16")
    assert result.returncode == 0, result.stderr
    plan = json.loads(path.read_text())
    assert plan["fits"] and plan["devices"] == 8 and plan["estimate"]["of"] == "the TPU compiler's cycles"
    # Every gradient goes over the network once and not once per view.
    sent = sum(c["bytes"] for c in plan["collectives"] if c["origin"] == "backward")
    assert sent < 1.3 * plan["collective_bytes_minimum"]["gradients"] + plan["collective_bytes_minimum"]["batch_norm"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, flags, message",
    [
        ("v3:8x9", (), "v3 has 2x2"),
        ("gpu:h100x5", (), "64 rows of 'views' in a batch do not divide over 5 device"),
        ("gpu:h100x4", ("--config.run.fsdp=3",), "config.run.fsdp=3 does not divide the 4 device"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(topology, flags, message):
    result = run_plan(topology, *flags)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and message in errors[0], result.stderr
