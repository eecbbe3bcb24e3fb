"""Chains and particles over devices and processes: the answers of one device, to rounding; chunks and memory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import ebm_ppl as ebm
from ebm_ppl import parallel, sharding, smc, xla
from ebm_ppl.sharding import Layout

ROUNDING = 1e-9
"""Of numbers of the size of one: sums in another order, carried through moves that do not magnify them."""
SAMPLER = ebm.SMC(num_particles=800, kernel=ebm.MALA())
IN_CHUNKS = ebm.SMC(num_particles=800, kernel=ebm.MALA(), chunk_size=60)
"""60 does not divide the particles, nor 30 those of a half."""

DEVICES = """
import json, jax
jax.config.update("jax_enable_x64", True)
import test_sharding
test_sharding.in_a_hurry()
print(json.dumps(test_sharding.comparison(jax.make_mesh((2, 2), ("a", "b")))))
"""
PROCESSES = """
import json, sys, jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
number, port = map(int, sys.argv[1:])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
import test_sharding
test_sharding.in_a_hurry()
print(json.dumps(test_sharding.answers(jax.make_mesh((2,), ("devices",)))))
"""


def model(y):
    x = numpyro.sample("x", dist.Normal(0, 3).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(x[0] + x[1], 1), obs=y)


def target():
    return ebm.target(model, jnp.array([1.0, 2.0, 3.0]))


def with_linear_algebra():
    x = numpyro.sample("x", dist.Normal(0, 1))
    ebm.energy_factor("det", jnp.sum(jnp.linalg.cholesky(jnp.eye(3) * (1 + x**2))))


def with_transforms():
    x = numpyro.sample("x", dist.Normal(0, 1))
    ebm.energy_factor("spectrum", jnp.abs(jnp.fft.fft2(jnp.eye(3) * x)).sum())


def answers(mesh=None, sampler=SAMPLER):
    """log Z, particles and draws of chains, from the same keys whatever the mesh, and what they take."""
    memory = ebm.memory(target(), sampler, mesh=mesh)
    particles = ebm.sample(jax.random.key(0), target(), sampler, num_chains=1, mesh=mesh, progress_bar=False)
    found = ebm.read_log_z(particles)
    draws, state = draw(mesh, return_state=True)
    return {
        "log_z": [found.value, found.std_error, found.diagnostics["num_evaluations"]],
        "particles": particles["posterior"]["x"].values.ravel().tolist(),
        "draws": draws["posterior"]["x"].values.ravel().tolist(),
        "continued": draw(mesh, state=state)["posterior"]["x"].values.ravel().tolist(),
        "on other devices": draw(None, state=state)["posterior"]["x"].values.ravel().tolist(),
        "memory": memory,
    }


def draw(mesh, **settings):
    lengths = {"num_chains": 4, "num_warmup": 30, "num_samples": 10}
    return ebm.sample(jax.random.key(1), target(), ebm.MALA(), **lengths, mesh=mesh, progress_bar=False, **settings)


def comparison(mesh):
    """What one process of four devices has to say."""
    on_mesh, alone = (
        ebm.log_z(jax.random.key(0), ebm.target(with_linear_algebra), SAMPLER, mesh=each).value for each in (mesh, None)
    )
    try:
        said = ebm.log_z(jax.random.key(0), ebm.target(with_transforms), SAMPLER, mesh=mesh)
    except ebm.EnergyError as error:
        said = str(error)
    devices = [len(cloud.z.sharding.device_set) for cloud in clouds_on(mesh)]
    found = {"here": answers(), "mesh": answers(mesh), "refused": said, "devices": devices}
    found["linear algebra"] = [on_mesh, alone]
    return found | {"chunks": answers(None, IN_CHUNKS), "chunks on a mesh": answers(mesh, IN_CHUNKS)}


def in_a_hurry():
    """Compiles without optimisation what has a level of its own, too."""
    xla.EFFORT = xla.LEAST_EFFORT


def clouds_on(mesh):
    seen = []
    smc.run(jax.random.key(0), target(), SAMPLER, mesh=mesh, progress_bar=False, visit=seen.extend)
    return seen


def _run(source, num_processes, devices_of_each):
    """What each of several processes of so many devices prints; they compile without optimisation, to be quick."""
    flags = f"--xla_force_host_platform_device_count={devices_of_each} --xla_backend_optimization_level=0"
    root = Path(ebm.__file__).parents[1]
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{root}{os.pathsep}{Path(__file__).parent}"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = [
        subprocess.Popen([sys.executable, "-c", source, str(i), str(port)], **pipes) for i in range(num_processes)
    ]
    try:
        printed = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), printed
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in printed]


@pytest.fixture(scope="module")
def found():
    return _run(DEVICES, 1, 4)[0]


def check_that_only_rounding_differs(one, other):
    for name in one.keys() - {"memory"}:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=ROUNDING, err_msg=name)


@pytest.mark.parametrize("how", ["mesh", "chunks", "chunks on a mesh"])
def test_only_rounding_differs(found, how):
    check_that_only_rounding_differs(found[how], found["here"])


def test_processes_have_the_answers_of_one_device(found):
    for answers in _run(PROCESSES, 2, 1):
        check_that_only_rounding_differs(answers, found["here"])


def test_particles_lie_on_all_devices(found):
    assert set(found["devices"]) == {4}


def test_chunks_and_devices_take_less_memory(found):
    assert found["mesh"]["memory"] < found["here"]["memory"]
    assert found["chunks"]["memory"] < found["here"]["memory"]


def test_devices_of_one_process_that_would_wait_forever_are_refused(found):
    assert "transforms" in found["refused"] and "jax.distributed" in found["refused"]


def test_devices_of_one_process_share_a_model_with_linear_algebra(found):
    """As batches, the Cholesky factors of one device would wait for those of another."""
    on_mesh, alone = found["linear algebra"]
    assert abs(on_mesh - alone) < ROUNDING


@pytest.mark.parametrize(("num", "size"), [(6, 3), (7, 3), (5, 4), (4, 9)])
def test_particles_renewed_in_chunks_are_renewed_once(num, size):
    states, others = jnp.arange(num * 2.0).reshape(num, 2), jnp.arange(num)

    def step(state, other):
        return state + 10 * other + 1, {"sum": jnp.sum(state)}

    renewed, stats = jax.jit(Layout(None, size).renewing(step))(states, others)
    np.testing.assert_array_equal(renewed, states + 10 * others[:, None] + 1)
    np.testing.assert_array_equal(stats["sum"], states.sum(axis=1))


class _FourDevices:
    size = 4


def _mesh():
    return jax.make_mesh((1,), ("devices",))


def test_what_a_mesh_is_not_for():
    for nothing in (4, jax.devices()):
        with pytest.raises(ebm.EnergyError, match=r"jax\.make_mesh"):
            ebm.log_z(jax.random.key(0), target(), SAMPLER, mesh=nothing)
    with pytest.raises(ebm.EnergyError, match="AIS does not"):
        ebm.log_z(jax.random.key(0), target(), ebm.AIS(), mesh=_mesh())
    with pytest.raises(ebm.EnergyError, match="ParallelTempering does not"):
        ebm.sample(jax.random.key(0), target(), ebm.ParallelTempering(), mesh=_mesh())
    with pytest.raises(ebm.EnergyError, match="41 particles in each half"):
        sharding.require_equal_shares(41, _FourDevices(), "particles in each half")
    with pytest.raises(ebm.EnergyError, match="chunk_size is"):
        ebm.SMC(chunk_size=1)


def test_what_does_not_fit_is_refused_before_it_runs(monkeypatch):
    monkeypatch.setattr(parallel, "_room", lambda: 10_000)
    with pytest.raises(ebm.OutOfMemoryError, match=r"chunk_size"):
        ebm.log_z(jax.random.key(0), target(), ebm.SMC(num_particles=2000))


def test_runs_that_go_together_must_fit_together(monkeypatch):
    sampler = ebm.SMC(num_particles=100, kernel=ebm.MALA(), num_moves=1)
    monkeypatch.setattr(parallel, "_room", lambda: ebm.memory(target(), sampler, num_runs=2) - 1)
    ebm.log_z(jax.random.key(0), target(), sampler)
    with pytest.raises(ebm.OutOfMemoryError, match=r"chunk_size"):
        ebm.log_z(jax.random.key(0), target(), sampler, num_runs=2)
