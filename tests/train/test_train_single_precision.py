"""Every objective in JAX's default precision: runs end where those of double precision do.

All of them in one process, since a process has one precision by default. Those that draw nothing must agree up to
rounding; of the others the mean of several runs must, within its error (random numbers differ with the precision).
`latent` and noise-conditional energies have tests of their own.
"""

import numpy as np
from limits import t_limit

NUM = 6
SLICED = "score matching, 2 slices"
"""Which are exact on a line."""
DETERMINISTIC = ("score matching", SLICED, "pseudo-likelihood", "ratio matching", "concrete score matching")


def answers(num):
    """By name of the objective, (run, number): trained parameters after some steps, and log Z where it is told."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro.distributions as dist
    import optax

    import ebm_ppl as ebm

    class Quartic(ebm.Energy):
        weights: jax.Array

        def __call__(self, x):
            return self.weights[0] * x[0] ** 2 / 2 + self.weights[1] * x[0] ** 4

    rng = np.random.default_rng(0)
    line = np.where(rng.random((200, 1)) < 0.3, rng.normal(-2, 0.5, (200, 1)), rng.normal(1.5, 0.7, (200, 1)))
    bits = (rng.random((200, 3)) < 0.4).astype(float)
    bits[:, 1] = np.where(rng.random(200) < 0.7, bits[:, 0], bits[:, 1])
    normal, even = dist.Normal(0.0, 1.5).expand([1]).to_event(1), dist.Bernoulli(0.5).expand([3]).to_event(1)
    moves, flips = ebm.Dynamics(ebm.MALA(), 2), ebm.Dynamics(ebm.GibbsWithGradients(), 2)
    of_line = Quartic(jnp.array([-0.5, 0.05])), line, normal
    # Not from random weights, which differ with the precision.
    of_bits = jax.tree.map(jnp.zeros_like, ebm.BoltzmannEnergy(jax.random.key(0), 3)), bits, even
    cases = [
        (ebm.ScoreMatching(), *of_line),
        (ebm.ScoreMatching(2), *of_line),
        (ebm.DenoisingScoreMatching(0.3), *of_line),
        (ebm.EnergyDiscrepancy(), *of_line),
        (ebm.NoiseContrast(), *of_line),
        (ebm.MonteCarloLikelihood(256), *of_line),
        (ebm.ContrastiveDivergence(moves), *of_line),
        (ebm.PersistentContrastiveDivergence(256, dynamics=moves), *of_line),
        (ebm.Jarzynski(256), *of_line),
        (ebm.Jarzynski(256, dynamics=moves), *of_line),
        (ebm.Adversarial(ebm.ImplicitGenerator(jax.random.key(0), 1, width=8, depth=1, noise=1.0)), *of_line),
        (ebm.PseudoLikelihood(), *of_bits),
        (ebm.RatioMatching(), *of_bits),
        (ebm.ConcreteScoreMatching(), *of_bits),
        (ebm.Jarzynski(256, dynamics=flips), *of_bits),
    ]
    settings = {"optimiser": optax.adam(2e-2), "num_steps": 30, "every": 30, "batch_size": 200, "progress_bar": False}
    found = {}
    for objective, energy, data, base in cases:
        runs = []
        for seed in range(num):
            fitted = ebm.fit(jax.random.key(seed), energy, data, objective, base=base, **settings)
            told = fitted.record["training"]
            assert told["loss"].dtype == jnp.zeros(()).dtype
            numbers = [*jax.tree.leaves(fitted.energy), *([told["log_z"].values[-1]] if "log_z" in told else [])]
            runs.append(np.concatenate([np.ravel(np.asarray(x, float)) for x in numbers]).tolist())
        kernel = getattr(getattr(objective, "dynamics", None), "kernel", None)
        name = objective.name + (f", {objective.num_slices} slices" if getattr(objective, "num_slices", None) else "")
        found[name + (f", {kernel.name}" if kernel else "")] = runs
    return found


def test_runs_end_where_those_of_double_precision_do(in_both_precisions):
    single, double = in_both_precisions(answers, NUM)
    assert list(single) == list(double) and len(double) == 15
    sampled = [name for name in double if name not in DETERMINISTIC]
    limit = t_limit(sum(len(double[name][0]) for name in sampled), 2 * NUM - 2)
    for name in double:
        first, second = np.array(single[name]), np.array(double[name])
        if name in DETERMINISTIC:
            np.testing.assert_allclose(first, second, atol=1e-4, err_msg=name)
            continue
        error = np.sqrt((np.var(first, axis=0, ddof=1) + np.var(second, axis=0, ddof=1)) / NUM)
        moved = error > 0
        score = (first.mean(axis=0) - second.mean(axis=0))[moved] / error[moved]
        assert np.max(np.abs(score)) < limit and np.max(error) < 0.2, (name, score, error)
