"""The memory of a run of SMC, known before it: by the compiler's own account of the arrays that its programs hold.

    each run                     its cloud, in whose place a stage puts the next
    the runs that go together    temporary arrays, which `SMC(chunk_size=...)` makes smaller

Runs that cannot fit into their device are refused once their program is compiled (`parallel.caller`).
"""

from __future__ import annotations

import jax

from ebm_ppl import parallel, smc
from ebm_ppl.sharding import Mesh
from ebm_ppl.smc import SMC
from ebm_ppl.target import Tilted


def memory(target: Tilted, sampler: SMC, *, num_runs: int = 1, mesh: Mesh | None = None) -> int:
    """Bytes of arrays that a device holds at the worst moment of a run of SMC.

        num_runs * cloud + temporary arrays of the runs that go together

    What is compiled for the estimate serves the run. Not counted are Python, JAX and its compiler (some .7 GB on the
    CPU), and what is made of the draws afterwards: `sample` has several copies of them on the host.

    Args:
        target, sampler, num_runs, mesh: as they will be passed to `log_z`.
    """
    layout, keys, target = smc.laid_out(jax.random.key(0), target, sampler, num_runs, mesh)
    return max(parallel.num_bytes(program, len(keys)) for program in smc.prepare(target, sampler, layout, keys))
