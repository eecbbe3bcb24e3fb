"""Breaks the package on purpose, one fault at a time, and shows that the tests see each.

    python tests/mutations.py              all mutations
    python tests/mutations.py jacobian     those whose name contains a word

Each mutation replaces a string, which must occur exactly once, in a scratch copy of the package and its tests, and runs
the tests aimed at it there. It is caught where a test fails. The same tests must first pass on an unbroken copy,
or their failure would say nothing. Exits non-zero if a mutation survives.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A fault: `old` becomes `new` in `ebm_ppl/<file>`; `tests` are pytest's node ids below `tests/`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _moments(sampler: str, problem: str) -> str:
    return f"test_mcmc.py::test_moments[{sampler}-{problem}]"


def _smc(problem: str) -> str:
    return f"test_smc.py::test_evidence_and_particles[{problem}]"


_LATENT = "test_latent.py::test_log_p_is_unbiased_and_its_gradient_right_while_the_parameters_move"


MUTATIONS = (
    Mutation(
        "a guess that is pulled after its draws by their distance",
        "models/calibrated.py",
        "jnp.mean(guess.log_prob(jax.lax.stop_gradient(moved)))",
        "-jnp.mean(jnp.sum((guess.sample(key_draws) - jax.lax.stop_gradient(moved)) ** 2, axis=-1))",
        ("models/test_calibrated.py::test_a_guess_that_is_the_posterior_stays_as_it_is",),
    ),
    Mutation(
        "nodes of a graph that are far from all data and have a say",
        "models/graph_ebm.py",
        "jnp.exp(jnp.minimum(energy.limit - independent, 0)) * (evidence + independent)",
        "evidence + independent",
        (
            "models/test_graph_ebm.py::test_strange_nodes_are_found_and_do_not_spoil_predictions",
            "models/test_graph_ebm.py::test_a_far_node_has_no_say",
        ),
    ),
    Mutation(
        "evidence of a graph's nodes that grows with their distance",
        "models/graph_ebm.py",
        "return logits - self.strength * (self.offset",
        "return logits + self.strength * (self.offset",
        (
            "models/test_graph_ebm.py::test_strange_nodes_are_found_and_do_not_spoil_predictions",
            "models/test_graph_ebm.py::test_energy_grows_as_a_square_along_a_hundred_rays",
        ),
    ),
    Mutation(
        "a bound without the number of its chains",
        "models/annealed.py",
        "lower=logsumexp(log_weight, axis=1) - log_num",
        "lower=logsumexp(log_weight, axis=1)",
        ("models/test_bounds.py::test_weights_of_both_directions_are_unbiased[wrong]",),
    ),
    Mutation(
        "weights of reverse chains before their moves",
        "models/annealed.py",
        "log_weight + at.step * course.log_ratio(moved), moved",
        "log_weight + at.step * course.log_ratio(z), moved",
        ("models/test_bounds.py::test_weights_of_both_directions_are_unbiased[wrong]",),
    ),
    Mutation(
        "a path that ends in the guess",
        "models/annealed.py",
        "self.guess.log_prob(z) + at.beta * self.log_ratio(z)",
        "self.guess.log_prob(z)",
        ("models/test_bounds.py::test_weights_of_both_directions_are_unbiased[wrong]",),
    ),
    Mutation(
        "tails of networks that tilt a base as suspect as all",
        "probe.py",
        "FASTER_THAN_LINEAR if name in target.latent_names else FASTER",
        "FASTER",
        ("test_faults.py::test_row_06_says_nothing_about_a_network_that_tilts_a_base",),
    ),
    Mutation(
        "a guess that is refined without its own density",
        "models/latent.py",
        "guess.log_prob(z) - self.log_joint(data, z)",
        "-self.log_joint(data, z)",
        (
            "models/test_latent_model.py::test_a_wrong_guess_is_refined_to_the_posterior[SMC]",
            "models/test_latent_model.py::test_the_evidence_of_a_refined_guess_is_the_likelihood",
        ),
    ),
    Mutation(
        "a latent prior without its log Z",
        "models/vae.py",
        "return self.beta * log_z - bound, (",
        "return -bound, (",
        ("models/test_vae.py::test_gradient_of_a_tilted_prior_is_that_of_the_likelihood",),
    ),
    Mutation(
        "a bound with the rate's sign flipped",
        "models/vae.py",
        "log_weights = reconstruction - self.beta * rate",
        "log_weights = reconstruction + self.beta * rate",
        ("models/test_vae.py::test_bound_is_numpyros",),
    ),
    Mutation(
        "an importance-weighted bound without the number of its draws",
        "models/vae.py",
        "logsumexp(log_weights, axis=0)) - jnp.log(float(self.num_draws))",
        "logsumexp(log_weights, axis=0))",
        ("models/test_vae.py::test_importance_weighted_bound_is_tight_where_draws_are_many",),
    ),
    Mutation(
        "one draw for all events of a bound",
        "models/vae.py",
        "z = guess.sample(key_draws, (self.num_draws,))",
        "z = (guess.mean + jnp.sqrt(guess.variance) * jax.random.normal(key_draws, guess.event_shape))[None]",
        ("models/test_vae.py::test_events_have_draws_of_their_own",),
    ),
    Mutation(
        "a critic trained to call draws data",
        "models/critic.py",
        "jnp.mean(jax.nn.softplus(-of_data)) + jnp.mean(jax.nn.softplus(of_drawn))",
        "jnp.mean(jax.nn.softplus(of_data)) + jnp.mean(jax.nn.softplus(-of_drawn))",
        ("models/test_critic.py::test_the_best_critic_is_the_log_density_ratio",),
    ),
    Mutation(
        "the Wasserstein penalty of a critic at the data alone",
        "models/critic.py",
        "slope(share * x + (1 - share) * y)",
        "slope(x)",
        ("models/test_critic.py::test_the_wasserstein_penalty_is_between_data_and_draws",),
    ),
    Mutation(
        "sign of the critic in the energy of latent variables",
        "models/tilt.py",
        "return -self.critic(",
        "return self.critic(",
        (
            "models/test_tilt.py::test_a_known_ratio_makes_the_generator_the_data",
            "models/test_tilt.py::test_latent_sampling_has_the_moments_of_the_data[SMC]",
        ),
    ),
    Mutation(
        "calibration of a critic without the numbers of data and draws",
        "models/tilt.py",
        "columns @ weights + prior",
        "columns @ weights + 0 * prior",
        ("models/test_tilt.py::test_calibration_finds_the_scale_of_a_log_ratio",),
    ),
    Mutation(
        "one draw of the base for all weights of a tilt",
        "models/tilt.py",
        "energy = np.asarray(_values(model.energy, z))",
        "energy = np.asarray(_values(model.energy, z[:1].repeat(num, 0)))",
        ("models/test_tilt.py::test_weights_of_a_normal_tilt_and_their_errors",),
    ),
    Mutation(
        "a radius of modes that is taken for its square",
        "evaluate/chains.py",
        "squares <= within**2",
        "squares <= within",
        ("evaluate/test_chains.py::test_points_far_from_their_centre_count_for_no_mode",),
    ),
    Mutation(
        "the log density of a base that goes on beyond its support",
        "train/objective.py",
        "jnp.where(base.support(x), value, -jnp.inf) if has_borders(base) else value",
        "value",
        ("train/test_objectives.py::test_walkers_stay_in_the_support_of_the_base",),
    ),
    Mutation(
        "the error of an area by one of its two samples",
        "evaluate/classification.py",
        "len(high) + np.var(of_low, ddof=1) / len(low))",
        "len(high))",
        ("evaluate/test_classification.py::test_area_and_its_error_over_replications",),
    ),
    Mutation(
        "log weights added up in their own precision",
        "typing.py",
        "np.logaddexp.reduce(np.asarray(log_values, np.float64))",
        "np.logaddexp.reduce(np.asarray(log_values))",
        ("test_evidence.py::test_many_numbers_of_single_precision_add_up",),
    ),
    Mutation(
        "sign of the log determinant of a normalising flow",
        "flow.py",
        "log_density = log_det + ",
        "log_density = -log_det + ",
        ("test_flow.py::test_density_is_that_of_the_transformed_base[2]",),
    ),
    Mutation(
        "gradient of the reverse divergence without the target",
        "models/flow_fit.py",
        "lambda z: -fixed(z) - log_joint(target, z)",
        "lambda z: -fixed(z)",
        ("models/test_flow_fit.py::test_gradients_of_both_divergences_are_those_of_their_closed_forms[ReverseKL]",),
    ),
    Mutation(
        "sign of the weights of the forward divergence",
        "models/flow_fit.py",
        "jnp.where(jnp.isnan(energies), -jnp.inf, -energies)",
        "jnp.where(jnp.isnan(energies), -jnp.inf, energies)",
        ("models/test_flow_fit.py::test_gradients_of_both_divergences_are_those_of_their_closed_forms[ForwardKL]",),
    ),
    Mutation(
        "Jacobian of a flow dropped from a transported target",
        "transport.py",
        "references | {LOG_DET: self._log_det(z)}",
        "references",
        ("test_transport.py::test_draws_and_log_z_are_those_of_the_model",),
    ),
    Mutation(
        "sign of a flow's energy",
        "models/flow_model.py",
        "return -self.flow.log_prob(x)",
        "return self.flow.log_prob(x)",
        ("models/test_flow_model.py::test_density_integrates_to_one_and_is_drawn_from[splines]",),
    ),
    Mutation(
        "a flow as guide that does not look at the event",
        "flow_distribution.py",
        "return self.flow.sample(key, sample_shape, self.condition)",
        "return self.flow.sample(key, sample_shape, 0 * self.condition)",
        ("models/test_flow_encoder.py::test_evidence_bound_trains_the_guide_and_stays_below_the_likelihood",),
    ),
    Mutation(
        "share of the guard beside a normalising flow",
        "rebase.py",
        "jnp.log(share) + guard",
        "guard",
        ("test_flow.py::test_what_a_flow_cannot_reach_has_the_density_of_the_guard",),
    ),
    Mutation(
        "Jacobian of the non-centred coordinates",
        "kernels.py",
        "return log_density(z) + log_det",
        "return log_density(z)",
        ("test_centring.py::test_chains_in_learned_coordinates_leave_the_posterior_as_it_is",),
    ),
    Mutation(
        "sign of the energy in EnergyDistribution.log_prob",
        "distribution.py",
        " - self.tilt(value)",
        " + self.tilt(value)",
        ("test_problems.py::test_answer_agrees_with_weighted_draws_of_the_reference[constant_partition]",),
    ),
    Mutation(
        "sign of the energies in the log density",
        "target.py",
        "return log_reference - sum(energies.values(), jnp.zeros((), z.dtype))",
        "return log_reference + sum(energies.values(), jnp.zeros((), z.dtype))",
        (_moments("NUTS", "double_well"),),
    ),
    Mutation(
        "sign of an observed site's energy",
        "target.py",
        'energies[name] = -_scaled(site, site["fn"].log_prob(site["value"]))',
        'energies[name] = _scaled(site, site["fn"].log_prob(site["value"]))',
        (_smc("eight_schools"),),
    ),
    Mutation(
        "Jacobian dropped",
        "target.py",
        "            elif name in self.spec.jacobians:\n"
        '                references[name] = _scaled(site, site["fn"].log_prob(site["value"]))\n',
        "",
        (_moments("NUTS", "gamma_poisson"),),
    ),
    Mutation(
        "prior energy dropped from the base of the data phase",
        "cloud.py",
        "(log_reference - prior, data)",
        "(log_reference, data)",
        (_smc("three_roles"),),
    ),
    Mutation(
        "a loss counted with the prior",
        "target.py",
        'stages[role != "prior"] += energies[name]',
        'stages[role == "data"] += energies[name]',
        (_smc("three_roles"),),
    ),
    Mutation(
        "inverse temperature of a factor dropped",
        "distribution.py",
        "-jnp.asarray(beta) * as_energy_values(",
        "-as_energy_values(",
        (_smc("double_well"),),
    ),
    Mutation(
        "log partition dropped",
        "distribution.py",
        "energies + self.log_partition if self.is_normalized else energies",
        "energies",
        (_smc("quartic"),),
    ),
    Mutation(
        "-log N missing from the increment",
        "weighing.py",
        "increment = logsumexp(log_w) - jnp.log(num)",
        "increment = logsumexp(log_w)",
        ("test_smc.py::test_constant_energy_is_exact",),
    ),
    Mutation(
        "weights of the whole path instead of the step",
        "weighing.py",
        "log_w = log_weight(after - beta)",
        "log_w = log_weight(after)",
        (_smc("eight_schools"),),
    ),
    Mutation(
        "particles moved without resampling",
        "smc.py",
        "before[first].reshape",
        "cloud.z.reshape",
        (_smc("regression"),),
    ),
    Mutation(
        "move leaves the previous temperature's density invariant",
        "smc.py",
        "return base - beta * energy",
        "return base - cloud.beta * energy",
        (_smc("eight_schools"),),
    ),
    Mutation(
        "one key for the moves of all particles",
        "moves.py",
        "keys = jax.random.split(key_step, z.shape[:2])",
        "keys = jnp.broadcast_to(key_step, z.shape[:2])",
        (_smc("eight_schools"),),
    ),
    Mutation(
        "keys of the first chunk for every chunk",
        "sharding.py",
        "*chunk(others, start))",
        "*chunk(others, 0))",
        ("test_sharding.py::test_particles_renewed_in_chunks_are_renewed_once",),
    ),
    Mutation(
        "particles of the last chunk moved twice",
        "sharding.py",
        "jnp.arange(size) < i * size",
        "jnp.arange(size) < 0",
        ("test_sharding.py::test_particles_renewed_in_chunks_are_renewed_once",),
    ),
    Mutation(
        "other keys on a mesh",
        "sharding.py",
        "np.asarray(jax.random.key_data(x))",
        "np.zeros_like(jax.random.key_data(x))",
        ("test_sharding.py::test_only_rounding_differs[mesh]",),
    ),
    Mutation(
        "one key for all runs",
        "smc.py",
        "jax.random.split(key, num_runs)",
        "jnp.broadcast_to(key, (num_runs,))",
        ("test_smc.py::test_runs_are_independent_and_reproducible",),
    ),
    Mutation(
        "variance with the noise of resampling",
        "weighing.py",
        ".add(weights - jnp.mean(weights, axis=0))",
        ".at[:].add(-1 / num).at[ensemble.eve].add(weights)",
        ("test_smc.py::test_error_of_a_single_run_is_calibrated",),
    ),
    Mutation(
        "variance that forgets how few families are left",
        "weighing.py",
        " / jnp.maximum(1 - jnp.sum(share**2), jnp.finfo(weights.dtype).tiny)",
        "",
        ("test_smc.py::test_error_of_a_single_family_is_unknown",),
    ),
    Mutation(
        "variance of the last stage alone",
        "weighing.py",
        "influence = (learned @ ensemble.influence).at",
        "influence = jnp.zeros(num).at",
        ("test_smc.py::test_error_of_a_single_run_is_calibrated",),
    ),
    Mutation(
        "states of a chain that belong to different families",
        "smc.py",
        "eve=jnp.repeat(eve[first], length)",
        "eve=jnp.tile(eve[first], length)",
        ("test_smc.py::test_error_of_particles_used_again_is_calibrated[waste-free]",),
    ),
    Mutation(
        "stages of persistent sampling mixed without their log Z",
        "weighing.py",
        "energy[..., None] - ensemble.log_z",
        "energy[..., None] - jnp.minimum(ensemble.log_z, jnp.where(ensemble.log_z < jnp.inf, 0.0, jnp.inf))",
        ("test_weighing.py::test_weights_of_several_stages_are_those_of_blackjax",),
    ),
    Mutation(
        "log Z of earlier stages not passed on to the next",
        "smc.py",
        "ensemble=ensemble._replace(log_z=ensemble.log_z - weighed.increment)",
        "ensemble=ensemble",
        ("test_smc.py::test_particles_used_again[persistent-three_roles]",),
    ),
    Mutation(
        "error of persistent sampling that takes the earlier log Z for exact",
        "weighing.py",
        "learned @ ensemble.influence",
        "0 * learned @ ensemble.influence",
        ("test_smc.py::test_error_of_particles_used_again_is_calibrated[persistent]",),
    ),
    Mutation(
        "independence sampler without the density of its proposals",
        "independence.py",
        "return self._log_density(to.position, tuning)",
        "return 0.0 * self._log_density(to.position, tuning)",
        ("test_independence.py::test_draws_stay_distributed_as_they_are",),
    ),
    Mutation(
        "independence sampler with its proposal density at wrong ends",
        "independence.py",
        "def log_proposal(_: State, to: State)",
        "def log_proposal(to: State, _: State)",
        ("test_independence.py::test_proposals_are_accepted_as_by_metropolis_and_hastings",),
    ),
    Mutation(
        "independence sampler without a Jacobian in its proposals",
        "independence.py",
        "return log_det - (self.degrees + x.size)",
        "return -(self.degrees + x.size)",
        ("test_independence.py::test_draws_stay_distributed_as_they_are",),
    ),
    Mutation(
        "gradient not whitened",
        "kernels.py",
        "scale.pull(state.logdensity_grad))",
        "state.logdensity_grad)",
        (_moments("MALA", "gaussian"),),
    ),
    Mutation(
        "warm-up goes on while sampling",
        "mcmc.py",
        "warming_up: bool = False",
        "warming_up: bool = True",
        ("test_mcmc.py::test_sample_stats_have_the_names_of_arviz[NUTS]",),
    ),
    Mutation(
        "thinning off by one",
        "mcmc.py",
        "return Draws(z[:, thin - 1 :: thin],",
        "return Draws(z[:, ::thin],",
        ("test_mcmc.py::test_thinning_keeps_every_third_draw_from_the_third_on",),
    ),
    Mutation(
        "one key for all chains",
        "starts.py",
        "return Chain(state, key_chain, adaptation), finite",
        "return Chain(state, jax.random.fold_in(key, OF_CHAINS), adaptation), finite",
        ("test_mcmc.py::test_chains_are_independent_and_reproducible",),
    ),
    Mutation(
        "mean weight of a fitted reference without -log N",
        "typing.py",
        "log_sum(log_values) - math.log(len(log_values))",
        "log_sum(log_values)",
        ("logz/test_fitted.py::test_estimate_and_its_error[regression]",),
    ),
    Mutation(
        "one scrambling for all blocks",
        "logz/importance.py",
        "rngs = generator(key_cube).spawn(BLOCKS)",
        "rngs = [generator(key_cube) for _ in range(BLOCKS)]",
        ("logz/test_importance.py::test_blocks_are_draws_of_their_own",),
    ),
    Mutation(
        "evidence with the log Z of the prior added",
        "typing.py",
        "return whole - prior, math.hypot",
        "return whole + prior, math.hypot",
        ("logz/test_fitted.py::test_evidence_of_models_with_prior_energies[three_roles]",),
    ),
    Mutation(
        "runs that continue an estimate with the keys of its first ones",
        "evidence.py",
        "range(num_before, num_before + num_runs)",
        "range(num_runs)",
        ("test_evidence.py::test_error_of_an_estimate_that_was_continued[eight_schools]",),
    ),
    Mutation(
        "one key for all batches of SMC that continue an estimate",
        "evidence.py",
        "jax.random.fold_in(key, num_before) if num_before else key",
        "key",
        ("test_evidence.py::test_no_run_is_made_twice[normal_mean-method1]",),
    ),
    Mutation(
        "annealed moves at the temperature before",
        "logz/annealing.py",
        "return log_reference - at.beta * energy",
        "return log_reference - (at.beta - at.step) * energy",
        ("logz/test_annealing.py::test_weights_of_both_directions_agree_for_any_schedule_and_tuning",),
    ),
    Mutation(
        "reverse annealed chains in the order of the forward ones",
        "logz/annealing.py",
        "path.stages, reverse=True)",
        "path.stages)",
        ("logz/test_annealing.py::test_weights_of_both_directions_agree_for_any_schedule_and_tuning",),
    ),
    Mutation(
        "upper bound of annealed chains from weights that are not inverted",
        "logz/bdmc.py",
        "high, high_error = _bound(-reverse.log_weight)",
        "high, high_error = -_bound(reverse.log_weight)[0], _bound(reverse.log_weight)[1]",
        ("logz/test_annealing.py::test_bounds_bracket_the_truth",),
    ),
    Mutation(
        "bridge whose error takes a chain's draws for independent",
        "logz/bridge.py",
        "np.var(g, ddof=1) / np.mean(g) ** 2 / effective_size(g)",
        "np.var(g, ddof=1) / np.mean(g) ** 2 / g.size",
        ("logz/test_bridge.py::test_error_is_calibrated_for_chains_with_a_memory",),
    ),
    Mutation(
        "bridge warped about a point with the density of one side",
        "logz/bridge.py",
        "- math.log(log_p.shape[1]) - log_q",
        "- log_q",
        ("logz/test_bridge.py::test_estimate_and_its_error[three_roles-True]",),
    ),
    Mutation(
        "ladder whose chains are all at the posterior",
        "logz/ladder.py",
        "return log_reference - rung.beta * energy",
        "return log_reference - energy",
        ("logz/test_path.py::test_estimate_and_its_error[mixture-SteppingStone]",),
    ),
    Mutation(
        "ladder's correction of the integral with its sign flipped",
        "logz/path.py",
        "weight @ mean - correction @ variance\n",
        "weight @ mean + correction @ variance\n",
        ("logz/test_path.py::test_error_of_the_rule_of_integration",),
    ),
    Mutation(
        "ladder whose error is that of a sum over chains",
        "logz/path.py",
        "np.sqrt(np.sum(np.var(contributions, axis=1, ddof=1)) / contributions.shape[1])",
        "np.sqrt(np.sum(np.var(contributions, axis=1, ddof=1)) * contributions.shape[1])",
        ("logz/test_path.py::test_error_is_calibrated_for_chains_with_a_memory",),
    ),
    Mutation(
        "sign of the acceptance of a swap",
        "logz/replicas.py",
        "log_ratio = jnp.diff(beta) * jnp.diff(energy)",
        "log_ratio = -jnp.diff(beta) * jnp.diff(energy)",
        (
            "logz/test_tempering.py::test_swaps_leave_each_rung_its_distribution",
            "logz/test_tempering.py::test_estimate_and_its_error[mixture]",
        ),
    ),
    Mutation(
        "swaps by chance and not in turn",
        "logz/replicas.py",
        "(lower % 2 == number % 2)",
        "(lower % 2 == jax.random.bernoulli(jax.random.fold_in(key, 1)))",
        ("logz/test_tempering.py::test_walkers_pass_as_often_as_rejections_say",),
    ),
    Mutation(
        "swapped energies with points left where they are",
        "logz/replicas.py",
        "return Replica(replica.key, z[order], replica.walker[order], adapted), record",
        "return Replica(replica.key, z, replica.walker[order], adapted), record",
        ("logz/test_tempering.py::test_weights_of_modes_between_which_plain_chains_do_not_pass",),
    ),
    Mutation(
        "tempered chains that are all at the posterior",
        "logz/replicas.py",
        "return log_reference - beta * energy",
        "return log_reference - energy",
        ("logz/test_tempering.py::test_estimate_and_its_error[mixture]",),
    ),
    Mutation(
        "error of parallel tempering from rungs taken for independent",
        "logz/tempering.py",
        "np.sum(np.mean(contributions, axis=2), axis=0, keepdims=True)",
        "np.mean(contributions, axis=2)",
        ("logz/test_tempering.py::test_error_of_rungs_that_depend_on_one_another",),
    ),
    Mutation(
        "batches of linear algebra left as they are",
        "parallel.py",
        "if on_cpu and linear_algebra.num_batches",
        "if not on_cpu and linear_algebra.num_batches",
        ("test_linear_algebra.py::test_no_program_waits_for_itself_or_for_another",),
    ),
    Mutation(
        "a loop of a batch that goes on where its condition is met",
        "linear_algebra.py",
        "if still.ndim == 0:",
        "if True:",
        ("test_linear_algebra.py::test_the_answers_of_a_batch[while]",),
    ),
    Mutation(
        "points of nested sampling believed whatever the first opinion says",
        "logz/consultation.py",
        'return second.diagnostics.get("branch") == BY_PILOT',
        "return False",
        ("logz/test_consultation.py::test_points_of_nested_sampling_may_contradict_the_first",),
    ),
    Mutation(
        "room for one run where several go together",
        "parallel.py",
        "_require_room(num_bytes(program, num_parts))",
        "_require_room(num_bytes(program, 1))",
        ("test_sharding.py::test_runs_that_go_together_must_fit_together",),
    ),
    Mutation(
        "modes that the first opinion has met kept from the second",
        "logz/consultation.py",
        "functools.partial(self._by_nested, modes=modes)",
        "functools.partial(self._by_nested, modes=None)",
        ("logz/test_consultation.py::test_modes_that_the_first_has_met_are_told_to_the_second",),
    ),
    Mutation(
        "modes known from before forgotten by a search",
        "logz/search.py",
        "find_modes(target, starts, deviation, known)",
        "find_modes(target, starts, deviation, None)",
        ("logz/test_search.py::test_modes_known_from_before",),
    ),
    Mutation(
        "modes without a component left unsaid",
        "logz/search.py",
        "max(int(np.sum(missed)) - MOST_MODES, 0)",
        "0",
        (
            "logz/test_search.py::test_every_mode_gets_a_component_or_is_counted",
            "logz/test_search.py::test_modes_that_are_left_out_are_a_doubt",
        ),
    ),
    Mutation(
        "density of a fitted reference without its share",
        "rebase.py",
        "jnp.log1p(-share) + main",
        "main",
        ("test_rebase.py::test_reference_is_normalised_and_drawn_from",),
    ),
    Mutation(
        "nested sampling: a tie with the contour counted as born below it",
        "logz/nested.py",
        "np.searchsorted(births, self.deaths) - np.arange",
        'np.searchsorted(births, self.deaths, side="right") - np.arange',
        ("logz/test_nested.py::test_volumes_count_live_points_as_blackjax_does",),
    ),
    Mutation(
        "nested sampling: the share of the reference with mass forgotten",
        "logz/nested.py",
        "log_shell += math.log((num - zero - 1) / (num - 1)) if zero else 0.0",
        "log_shell += 0.0",
        ("logz/test_nested.py::test_part_of_the_reference_has_no_mass",),
    ),
    Mutation(
        "probabilities of models from half the error",
        "compare.py",
        "values + errors * _normal_points",
        "values + 0.5 * errors * _normal_points",
        ("test_compare.py::test_interval_of_two_models_is_exact[0.94-0.3]",),
    ),
    Mutation(
        "prior probabilities of models in another order",
        "compare.py",
        "float(prior[name]) for name in names",
        "float(prior[name]) for name in sorted(names, reverse=True)",
        ("test_compare.py::test_prior_probabilities_count",),
    ),
    Mutation(
        "blocks passed by without -log N",
        "sequential.py",
        "total - math.log(num)",
        "total",
        ("test_sequential.py::test_conjugate_model_at_every_observation",),
    ),
    Mutation(
        "blocks weighed as if none of the block under way were in",
        "sequential.py",
        "        energies[:, 0] *= 1 - start.part\n",
        "",
        ("test_sequential.py::test_conjugate_model_at_every_observation",),
    ),
    Mutation(
        "observations that are in forgotten by the moves",
        "blocks.py",
        "jnp.stack([prior + energies[0], energies[1]])",
        "jnp.stack([prior, energies[1]])",
        ("test_sequential.py::test_conjugate_model_at_every_observation",),
    ),
    Mutation(
        "error of the last block alone",
        "sequential.py",
        "influence = self.influence + np.bincount(",
        "influence = np.bincount(",
        ("test_sequential.py::test_conjugate_model_at_every_observation",),
    ),
    Mutation(
        "errors along the data of the last stage alone",
        "sequential.py",
        "self.influence = self.influence + np.asarray(cloud.influence, float)",
        "self.influence = np.asarray(cloud.influence, float)",
        ("test_sequential.py::test_conjugate_model_at_every_observation",),
    ),
    Mutation(
        "increments along the data taken for independent",
        "sequential.py",
        "changes @ changes.swapaxes(1, 2)",
        "changes @ changes.swapaxes(1, 2) * np.eye(num_times)",
        ("test_sequential.py::test_conjugate_model_at_every_observation",),
    ),
    Mutation(
        "a key used twice in a move",
        "moves.py",
        "jax.random.uniform(key_jitter, z.shape[:2]",
        "jax.random.uniform(key_step, z.shape[:2]",
        ("test_faults.py::test_row_15_no_key_is_used_twice[SMC]",),
    ),
    Mutation(
        "infinite density of the last moves not counted",
        "smc.py",
        "jnp.maximum(jnp.sum(cloud.energy == -jnp.inf), jnp.sum(new_energy == -jnp.inf))",
        "jnp.sum(cloud.energy == -jnp.inf)",
        ("test_faults.py::test_row_04_in_the_last_moves",),
    ),
    Mutation(
        "infinite density accepted inside NumPyro",
        "numpyro_kernel.py",
        "lambda new, old: jnp.where(infinite, old, new)",
        "lambda new, old: new",
        ("test_numpyro_kernel.py::test_what_cannot_be_raised_is_rejected_and_told[-inf-infinite_density]",),
    ),
    Mutation(
        "draws of a finite support without the energy",
        "distribution.py",
        "jax.random.categorical(key, self.log_prob(values), axis=0",
        "jax.random.categorical(key, self.base.log_prob(values), axis=0",
        ("test_distribution.py::test_on_a_finite_support_it_is_drawn_from[shape0]",),
    ),
    Mutation(
        "drift from particles without their weights",
        "smc.py",
        "newest @ jnp.where(newest[:, None] > 0, cloud.z, 0.0)",
        "jnp.mean(cloud.z, axis=0)",
        (_smc("regression"),),
    ),
    Mutation(
        "reverse chains taken for independent",
        "logz/bdmc.py",
        "bennett(forward.log_weight, reverse.log_weight, families)",
        "bennett(forward.log_weight, reverse.log_weight, np.arange(self.num_chains))",
        ("logz/test_annealing.py::test_starts_that_descend_from_few_draws_are_not_independent",),
    ),
    Mutation(
        "modes that no chain has been to left unsaid",
        "logz/bridge.py",
        "if missed > NEGLIGIBLE:",
        "if missed < 0:",
        ("logz/test_bridge.py::test_a_mode_that_no_chain_has_been_to_is_a_doubt",),
    ),
    Mutation(
        "an error of weights without a variance from their spread alone",
        "logz/importance.py",
        "if self.pareto_k > HAS_VARIANCE else spread",
        "if self.pareto_k > 9 else spread",
        ("logz/test_importance.py::test_two_standard_errors_cover_the_truth[0.65]",),
    ),
    Mutation(
        "the spread of sixteen blocks taken for known",
        "logz/importance.py",
        "STUDENT * relative_error(",
        "relative_error(",
        ("logz/test_importance.py::test_two_standard_errors_of_sixteen_blocks_cover_as_much_as_of_many",),
    ),
    Mutation(
        "a fit that is taken for its share, whatever its tail",
        "logz/importance.py",
        "return self.behaves, self.effective_share",
        "return True, self.effective_share",
        ("logz/test_search.py::test_a_fit_with_a_heavy_tail_is_not_good_enough",),
    ),
    Mutation(
        "weights kept by what they are themselves",
        "logz/fitted.py",
        "keeps = behaved and final.pareto_k <= HEAVIEST",
        "keeps = final.behaves and final.pareto_k <= 0.7",
        ("logz/test_fitted.py::test_draws_do_not_decide_whether_they_are_kept",),
    ),
    Mutation(
        "the mean of a normal distribution without what gradients say of it",
        "metric.py",
        "return jnp.mean(z, axis=0) + covariance @ jnp.mean(gradients, axis=0), ",
        "return jnp.mean(z, axis=0), ",
        ("test_metric.py::test_the_closest_normal_to_a_normal_is_that_normal",),
    ),
    Mutation(
        "gradients of a density that is not in the coordinates of the fit",
        "logz/search.py",
        "return u, jax.vmap(centring.pull)(u, gradients)",
        "return u, gradients",
        ("logz/test_search.py::test_gradients_in_coordinates_of_their_own",),
    ),
    Mutation(
        "a normal distribution by gradients that leaves a mode out",
        "logz/search.py",
        "if np.any(_unaccounted(given.modes, normal, centring, given.log_z)):",
        "if False:",
        ("logz/test_search.py::test_a_mode_that_the_gradients_know_nothing_of_is_left_to_mixtures",),
    ),
    Mutation(
        "scales that follow the coordinate of a value with bounds",
        "centring.py",
        "if by_value.unexplained < given.unexplained:",
        "if by_value.unexplained < 0:",
        ("test_centring.py::test_a_scale_between_bounds_follows_its_value_and_not_its_coordinate",),
    ),
    Mutation(
        "Jacobian of a logistic scale",
        "centring.py",
        "return self.mean + location + jnp.exp(log_scale) * u, jnp.sum(log_scale)",
        "return self.mean + location + jnp.exp(log_scale) * u, jnp.sum(self.slope * u[self.driver])",
        ("test_centring.py::test_the_map_is_a_bijection_with_the_jacobian_that_it_states",),
    ),
    Mutation(
        "drift of draws at infinity",
        "smc.py",
        "newest @ jnp.where(newest[:, None] > 0, cloud.z, 0.0)",
        "newest @ cloud.z",
        ("test_smc.py::test_draws_at_infinity_hide_no_drift",),
    ),
    Mutation(
        "a fingerprint that sees no masks",
        "target.py",
        'return over_events(scale, site["fn"]) * mask_of(site["fn"])',
        'return over_events(scale, site["fn"])',
        ("test_arviz.py::test_fingerprint_sees_what_counts",),
    ),
    Mutation(
        "calibration: a hinge that grows",
        "models/calibrated.py",
        "left = 1 - jnp.arange",
        "left = jnp.arange",
        ("models/test_calibrated.py::test_the_hinge_holds_back_at_first_and_lets_go",),
    ),
    Mutation(
        "calibration: the energy learns by the distance",
        "models/calibrated.py",
        "jax.vmap(jax.grad(fixed.tilt))",
        "jax.vmap(jax.grad(energy.tilt))",
        ("models/test_calibrated.py::test_the_model_learns_by_the_distance_and_the_energy_by_the_gap",),
    ),
    Mutation(
        "calibration: dual descent",
        "models/calibrated.py",
        "jnp.clip(weight + rise,",
        "jnp.clip(weight - rise,",
        ("models/test_calibrated.py::test_the_weight_follows_the_distance_within_its_bounds",),
    ),
    Mutation(
        "calibration: latents that climb",
        "models/calibrated.py",
        "jnp.sum(fixed.joint_energy(x, z))",
        "-jnp.sum(fixed.joint_energy(x, z))",
        ("models/test_calibrated.py::test_a_guess_is_drawn_to_the_posterior",),
    ),
    Mutation(
        "restoration: the noise of the observation left out",
        "models/calibrated.py",
        "spread = variance * operator.values**2 + noise**2",
        "spread = variance * operator.values**2",
        (
            "models/test_calibrated.py::test_an_event_is_restored_as_its_posterior_says[noise alone]",
            "models/test_calibrated.py::test_an_event_is_restored_as_its_posterior_says[seen in part]",
        ),
    ),
    Mutation(
        "a step of training by the key of the run",
        "train/fit.py",
        "key = jax.random.fold_in(jax.random.fold_in(given.key, STEPS), run.step)",
        "key = jax.random.fold_in(given.key, STEPS)",
        ("train/test_fit.py::test_every_point_is_taken_once_in_an_epoch",),
    ),
    Mutation(
        "the same order of the data in each epoch",
        "train/fit.py",
        "default_rng([*seed, number])",
        "default_rng(seed)",
        ("train/test_fit.py::test_every_point_is_taken_once_in_an_epoch",),
    ),
    Mutation(
        "Jarzynski's weights without the energy before",
        "train/jarzynski.py",
        "log_weight = population.log_weight + jax.vmap(self._left(density))(before, points)",
        "log_weight = population.log_weight",
        ("train/test_objectives.py::test_log_z_of_the_witness_is_unbiased_while_the_energy_moves[MALA]",),
    ),
    Mutation(
        "Jarzynski's weights of an unadjusted kernel without its bias",
        "train/jarzynski.py",
        "return value + (y - x) @ slope / 2 + self.dynamics.step_size * slope @ slope / 4",
        "return value",
        (
            "train/test_objectives.py::test_log_z_of_the_witness_is_unbiased_while_the_energy_moves[Langevin]",
            "train/test_objectives.py::test_what_a_move_leaves_is_the_ratio_of_forward_and_backward_kernels",
        ),
    ),
    Mutation(
        "the gradient of Jarzynski's walkers without their weights",
        "train/jarzynski.py",
        "energy_gap(density, batch, state.driver.points, state.driver.weights)",
        "energy_gap(density, batch, state.driver.points)",
        ("train/test_objectives.py::test_gradient_is_that_of_the_likelihood[jarzynski, unadjusted]",),
    ),
    Mutation(
        "log Z of a resampled population forgotten",
        "train/jarzynski.py",
        "log_z=population.log_z + population.log_mean,",
        "log_z=population.log_z,",
        ("train/test_objectives.py::test_log_z_of_the_witness_is_unbiased_while_the_energy_moves[resampled]",),
    ),
    Mutation(
        "the witness of Jarzynski's walkers moves by the driver's key",
        "train/jarzynski.py",
        "zip(jax.random.split(key), (state.driver, state.witness), strict=True)",
        "zip((key, key), (state.driver, state.witness), strict=True)",
        ("train/test_latent.py::test_driver_and_witness_have_noise_of_their_own",),
    ),
    Mutation(
        "the standard error of Jarzynski's log Z without the families of the walkers",
        "train/jarzynski.py",
        "influence=population.influence_now(),",
        "influence=population.influence,",
        (f"train/{_LATENT}[resampled]",),
    ),
    Mutation(
        "the gradient of the marginal likelihood without the weights of the walkers",
        "train/latent.py",
        "jax.lax.stop_gradient(state.driver.weights) @",
        "jnp.full(self.num_walkers, 1 / self.num_walkers) @",
        (f"train/{_LATENT}[adjusted]",),
    ),
    Mutation(
        "the sign of the marginal likelihood",
        "train/latent.py",
        "loss = energy - jax.lax.stop_gradient(energy + told",
        "loss = -energy - jax.lax.stop_gradient(-energy + told",
        (f"train/{_LATENT}[adjusted]",),
    ),
    Mutation(
        "log p(y) at the first parameters forgotten",
        "train/latent.py",
        "points.dtype), objective.log_z)",
        "points.dtype), jnp.zeros(2))",
        (f"train/{_LATENT}[adjusted]",),
    ),
    Mutation(
        "the sign of the gap of energies",
        "train/objective.py",
        "return of_data - of_negatives, of_negatives - of_data",
        "return of_negatives - of_data, of_negatives - of_data",
        ("train/test_objectives.py::test_gradient_is_that_of_the_likelihood[persistent]",),
    ),
    Mutation(
        "the trace of score matching with the other sign",
        "train/score.py",
        "jnp.mean(slope**2 / 2 - curvature)",
        "jnp.mean(slope**2 / 2 + curvature)",
        ("train/test_objectives.py::test_score_matching_of_a_bell_is_in_closed_form",),
    ),
    Mutation(
        "the Monte Carlo likelihood with the sum of the weights for their mean",
        "train/likelihood.py",
        "log_z = logsumexp(log_weights) - jnp.log(float(self.num_draws))",
        "log_z = logsumexp(log_weights)",
        ("train/test_objectives.py::test_log_z_of_the_monte_carlo_likelihood_is_unbiased",),
    ),
    Mutation(
        "the Monte Carlo likelihood with weights the other way",
        "train/likelihood.py",
        "log_weights = -energies",
        "log_weights = energies",
        ("train/test_objectives.py::test_gradient_is_that_of_the_likelihood",),
    ),
    Mutation(
        "a buffer of which the first walkers move more often",
        "train/likelihood.py",
        "jax.random.randint(key_choice, (), 0, self.num_walkers)",
        "jax.random.randint(key_choice, (), 0, self.num_walkers // 2)",
        ("train/test_objectives.py::test_walkers_of_a_buffer_are_chosen_alike",),
    ),
    Mutation(
        "noise contrast without the ratio of noise to data",
        "train/contrast.py",
        "- log_noise - jnp.log(float(self.ratio))",
        "- log_noise",
        ("train/test_objectives.py::test_noise_contrast_at_the_truth_has_the_right_log_z_and_no_slope",),
    ),
    Mutation(
        "energy discrepancy away from the data alone",
        "train/contrast.py",
        "neighbours = away + self.noise * jax.random.normal(key_back, shape, batch.dtype)",
        "neighbours = jnp.broadcast_to(away, shape)",
        ("train/test_objectives.py::test_energy_discrepancy_is_least_at_the_density_of_the_data",),
    ),
    Mutation(
        "evaluate: the divergence in the Stein kernel",
        "evaluate/stein.py",
        "slope * (along + len(x) - 3 *",
        "slope * (along - 3 *",
        (
            "evaluate/test_stein.py::test_kernel_is_the_one_of_the_definition",
            "evaluate/test_stein.py::test_size_is_five_percent[bell]",
        ),
    ),
    Mutation(
        "evaluate: signs of one point of each pair alone",
        "evaluate/stein.py",
        "statistics = jnp.sum(signs * sums, axis=0)",
        "statistics = jnp.sum(sums, axis=0)",
        ("evaluate/test_stein.py::test_size_is_five_percent[bell]",),
    ),
    Mutation(
        "evaluate: a point paired with itself",
        "evaluate/significance.py",
        "return row.at[i].set(0.0) @ weights",
        "return row @ weights",
        (
            "evaluate/test_stein.py::test_statistic_and_p_value_are_those_of_the_whole_matrix",
            "evaluate/test_two_sample.py::test_mmd_is_the_formula[imq]",
        ),
    ),
    Mutation(
        "evaluate: independent signs for chains",
        "evaluate/stein.py",
        "PERSISTENCE = 0.7",
        "PERSISTENCE = 0.0",
        ("evaluate/test_stein.py::test_size_of_chains_that_are_thinned_with_signs_that_last",),
    ),
    Mutation(
        "evaluate: signs that all chains start with",
        "evaluate/stein.py",
        "jax.random.fold_in(key, 1), 0.5, (num_chains, 1, num)",
        "jax.random.fold_in(key, 1), 1.0, (num_chains, 1, num)",
        ("evaluate/test_stein.py::test_signs_are_as_correlated_as_they_should_be",),
    ),
    Mutation(
        "evaluate: Jacobian of unconstrained space in the score",
        "evaluate/stein.py",
        "return density.log_density(jnp.ravel(x)) + transform.log_abs_det_jacobian(u, x)",
        "return density.log_density(jnp.ravel(x))",
        ("evaluate/test_stein.py::test_expectation_under_the_density_is_zero_in_bounded_support_too",),
    ),
    Mutation(
        "evaluate: a simulated p-value of the tail below",
        "evaluate/significance.py",
        "jnp.sum(simulated >= limit)",
        "jnp.sum(simulated <= statistic + slack)",
        ("evaluate/test_stein.py::test_power[shifted by .3]", "evaluate/test_two_sample.py::test_power"),
    ),
    Mutation(
        "evaluate: permutations that are all one",
        "evaluate/two_sample.py",
        "keys = jax.random.split(key, num_permutations)",
        "keys = jnp.repeat(key[None], num_permutations)",
        ("evaluate/test_two_sample.py::test_p_values_of_permutations_are_uniform_where_there_is_no_difference",),
    ),
    Mutation(
        "evaluate: pairs between two samples counted once",
        "evaluate/two_sample.py",
        "- 2 * between / (num_x * num_y)",
        "- between / (num_x * num_y)",
        ("evaluate/test_two_sample.py::test_mmd_is_the_formula[gaussian]",),
    ),
    Mutation(
        "evaluate: a classifier judged at what it was trained on",
        "evaluate/two_sample.py",
        "return jax.vmap(trained)(test)",
        "return jax.vmap(trained)(train)",
        ("evaluate/test_two_sample.py::test_classifier_that_learns_nothing_is_a_coin",),
    ),
    Mutation(
        "evaluate: Holm's factors the wrong way round",
        "evaluate/significance.py",
        "np.arange(len(order), 0, -1)",
        "np.arange(1, len(order) + 1)",
        ("evaluate/test_two_sample.py::test_holm_keeps_false_alarms_below_the_level",),
    ),
    Mutation(
        "evaluate: errors of shares of modes as of independent draws",
        "evaluate/chains.py",
        "num = np.minimum(of_modes, num)",
        "num = np.maximum(of_modes, num)",
        ("evaluate/test_chains.py::test_errors_are_those_of_replications[True]",),
    ),
    Mutation(
        "evaluate: likelihood without the base",
        "evaluate/evaluate.py",
        "each = -np.asarray(_values(density, points)[1], float) - found.value",
        "each = -np.asarray(_values(density, points)[0], float) - found.value",
        ("evaluate/test_evaluate.py::test_log_likelihood_is_minus_the_energy_relative_to_log_z",),
    ),
    Mutation(
        "evaluate: bounds of log Z the wrong way round",
        "evaluate/evaluate.py",
        "lower=bracket.lower,\n        upper=bracket.upper,",
        "lower=bracket.upper,\n        upper=bracket.lower,",
        ("evaluate/test_evaluate.py::test_log_z_is_that_of_quadrature_within_its_error_and_its_bounds",),
    ),
    Mutation(
        "evaluate: another energy in the model whose log Z is wanted",
        "evaluate/evaluate.py",
        'energy_factor("energy", density.tilt(x), role="loss")',
        'energy_factor("energy", 2.0 * density.tilt(x), role="loss")',
        ("evaluate/test_evaluate.py::test_log_z_is_that_of_quadrature_within_its_error_and_its_bounds",),
    ),
    Mutation(
        "discrete: hidden units of an RBM summed out with the other sign",
        "lattice/energy.py",
        "return -self.visible_bias @ x.ravel() - jnp.sum(",
        "return -self.visible_bias @ x.ravel() + jnp.sum(",
        (
            "lattice/test_lattice_energy.py::test_free_energy_of_an_rbm_is_its_joint_energy_with_hidden_units_summed_out",
        ),
    ),
    Mutation(
        "discrete: log Z over hidden states without their bias",
        "lattice/energy.py",
        "return -self.hidden_bias @ hidden - jnp.sum(",
        "return -jnp.sum(",
        ("lattice/test_lattice_energy.py::test_log_z_of_an_rbm_is_the_same_by_either_layer[sizes0]",),
    ),
    Mutation(
        "discrete: each pair of a Boltzmann machine counted twice",
        "lattice/energy.py",
        "- x @ self.couplings @ x / 2",
        "- x @ self.couplings @ x",
        ("lattice/test_lattice_energy.py::test_energy_of_a_boltzmann_machine_is_a_sum_over_pairs",),
    ),
    Mutation(
        "discrete: Gibbs by the densities of the others alone",
        "lattice/gibbs.py",
        "log_densities = jnp.append(state.logdensity, ",
        "log_densities = jnp.append(0.0 * state.logdensity, ",
        ("lattice/test_gibbs.py::test_a_move_leaves_the_density_as_it_is[Gibbs]",),
    ),
    Mutation(
        "discrete: Gibbs with one noise for all coordinates",
        "lattice/gibbs.py",
        "noise = jax.random.gumbel(key, (dim, self.num_states), state.logdensity.dtype)",
        "noise = jnp.tile(jax.random.gumbel(key, (1, self.num_states), state.logdensity.dtype), (dim, 1))",
        ("lattice/test_gibbs.py::test_transitions_have_their_probabilities[Gibbs]",),
    ),
    Mutation(
        "discrete: Gibbs with gradients without the way back",
        "lattice/gibbs.py",
        "+ log_proposal(there)[at] - forward[at]",
        "",
        ("lattice/test_gibbs.py::test_a_move_is_in_detailed_balance[with gradients]",),
    ),
    Mutation(
        "discrete: block Gibbs whose proposals are all accepted",
        "lattice/gibbs.py",
        "- rbm(x) - slope @ (visible - x)",
        "- rbm(x) - slope @ (visible - x) + jnp.inf",
        ("lattice/test_gibbs.py::test_a_move_leaves_the_density_as_it_is[block, coupled base]",),
    ),
    Mutation(
        "discrete: both layers by one key",
        "lattice/gibbs.py",
        "jax.random.bernoulli(key_visible, ",
        "jax.random.bernoulli(key_hidden, ",
        ("lattice/test_gibbs.py::test_transitions_have_their_probabilities[block]",),
    ),
    Mutation(
        "discrete: neighbours lower where they are higher",
        "train/discrete.py",
        "here - jax.vmap(density.total)(changes",
        "-here + jax.vmap(density.total)(changes",
        ("train/test_discrete.py::test_the_truth_and_nothing_beside_it_has_no_slope[pseudo-rbm]",),
    ),
    Mutation(
        "discrete: ratio matching without the other states",
        "train/discrete.py",
        "return jnp.sum((probabilities.at[0].add(-1)) ** 2) / 2",
        "return (1 - probabilities[0]) ** 2",
        ("train/test_discrete.py::test_the_loss_is_a_divergence_from_the_data_and_a_constant[ratio-three states]",),
    ),
    Mutation(
        "discrete: concrete scores with the cross term at the point itself",
        "train/discrete.py",
        "- 2 * jnp.exp(-differences)",
        "- 2 * jnp.exp(differences)",
        ("train/test_discrete.py::test_the_truth_and_nothing_beside_it_has_no_slope[concrete-rbm]",),
    ),
    Mutation(
        "discrete: some coordinates counted as all",
        "train/discrete.py",
        "return dim * jnp.mean(jax.vmap(at)(chosen))",
        "return jnp.sum(jax.vmap(at)(chosen))",
        ("train/test_discrete.py::test_some_coordinates_are_right_on_average[pseudo]",),
    ),
    Mutation(
        "discrete: moves of persistent walkers forgotten",
        "train/likelihood.py",
        "return loss, (Buffer(state.points.at[chosen].set(points), step_size), metrics)",
        "return loss, (Buffer(state.points, step_size), metrics)",
        ("train/test_discrete.py::test_gradient_is_that_of_the_likelihood[persistent]",),
    ),
    Mutation(
        "discrete: weights of Jarzynski's walkers without the energy of where they are",
        "train/jarzynski.py",
        "return population._replace(log_weight=population.log_weight - taken)",
        "return population._replace(log_weight=population.log_weight - 0.5 * taken)",
        ("train/test_discrete.py::test_log_z_of_the_witness_is_unbiased_while_the_weights_move[Gibbs]",),
    ),
    Mutation(
        "denoising at many levels without their weights",
        "train/score.py",
        "return jnp.sum((e - sigma * slope) ** 2) / 2",
        "return jnp.sum((e / sigma - slope) ** 2) / 2",
        ("train/test_noise.py::test_denoising_at_many_levels_is_least_at_the_noisy_density_of_each",),
    ),
    Mutation(
        "noise of denoising with the other sign",
        "train/score.py",
        "(x + sigma * e)\n",
        "(x - sigma * e)\n",
        ("train/test_noise.py::test_denoising_at_many_levels_is_least_at_the_noisy_density_of_each",),
    ),
    Mutation(
        "annealed weights without the energy of the level before",
        "train/anneal.py",
        "density.at(following).log_density(x) - here.log_density(x)",
        "density.at(following).log_density(x)",
        ("train/test_noise.py::test_annealing_has_the_draws_and_log_z_of_the_smallest_level[kernel0-0.5]",),
    ),
    Mutation(
        "annealed log Z of resampled walkers forgotten",
        "train/anneal.py",
        "jnp.where(share < resample, logsumexp(log_weight) - jnp.log(num), 0.0)",
        "0.0",
        ("train/test_noise.py::test_annealing_has_the_draws_and_log_z_of_the_smallest_level[kernel0-0.5]",),
    ),
    Mutation(
        "annealed weights without the density of the start",
        "train/anneal.py",
        "(points) - start.log_prob(events)",
        "(points)",
        ("train/test_noise.py::test_annealing_has_the_draws_and_log_z_of_the_smallest_level[kernel0-0.5]",),
    ),
    Mutation(
        "recovery without the noisy point",
        "train/recovery.py",
        " - jnp.sum((self.y - x) ** 2) / (2 * self.spread**2)",
        "",
        ("train/test_recovery.py::test_gradient_is_that_of_the_recovery_likelihood[MALA-noisy]",),
    ),
    Mutation(
        "recovery with the noise of a level for that between levels",
        "train/recovery.py",
        "spreads = jnp.sqrt(variance_between(sigmas, levels[level + 1]))",
        "spreads = levels[level + 1]",
        ("train/test_recovery.py::test_gradient_is_that_of_the_recovery_likelihood[MALA-noisy]",),
    ),
    Mutation(
        "recovery at a level without the noise of the level",
        "train/recovery.py",
        "x = batch + added *",
        "x = batch + 0.0 * added *",
        ("train/test_recovery.py::test_gradient_is_that_of_the_recovery_likelihood[MALA-noisy]",),
    ),
    Mutation(
        "moves of recovery from a reference without the noise of its draws",
        "train/recovery.py",
        "+ jnp.sqrt(share) * spread * ",
        "+ 0 * jnp.sqrt(share) * spread * ",
        ("models/test_hierarchical.py::test_a_chain_of_what_is_its_reference_needs_no_moves",),
    ),
    Mutation(
        "recovery without the weight of the density",
        "train/recovery.py",
        "loss + self.weight * value",
        "loss + value",
        ("models/test_hierarchical.py::test_the_gradient_of_the_density_is_added_with_its_weight",),
    ),
    Mutation(
        "a prior by diffusion with its base twice",
        "models/hierarchical.py",
        "self.conditional(x) - x @ x / 2",
        "self.conditional(x)",
        ("models/test_hierarchical.py::test_the_prior_is_the_density_at_the_lowest_level",),
    ),
    Mutation(
        "layers of a guess that do not see those above in its density",
        "models/hierarchical.py",
        "_moments(head, h, u[:start])",
        "_moments(head, h, 0 * u[:start])",
        (
            "models/test_hierarchical.py::test_a_guess_is_a_density_and_its_draws_have_it",
            "models/test_hierarchical.py::test_weights_of_the_guess_have_the_likelihood_as_their_mean",
        ),
    ),
    Mutation(
        "a chain of recovery walked upwards",
        "train/recovery.py",
        "points, given, reverse=True)",
        "points, given)",
        ("train/test_recovery.py::test_the_chain_walked_down_has_the_density_of_the_data[MALA]",),
    ),
    Mutation(
        "entropy of an implicit generator without that of its noise",
        "train/adversarial.py",
        "+ jnp.sum(self.log_noise) + of_encoder",
        "+ of_encoder",
        ("train/test_adversarial.py::test_entropy_of_an_implicit_generator_is_bounded_from_below",),
    ),
    Mutation(
        "entropy of a flow with the other sign",
        "train/adversarial.py",
        "return x, -unwrap(",
        "return x, unwrap(",
        ("train/test_adversarial.py::test_the_bound_is_below_log_z_by_the_divergence[flow]",),
    ),
    Mutation(
        "an energy that is trained by the bound of its generator",
        "train/adversarial.py",
        "fixed = without_gradient(density)",
        "fixed = density",
        ("train/test_adversarial.py::test_energy_and_generator_have_the_slopes_that_they_should[implicit]",),
    ),
    Mutation(
        "a generator that lowers its bound",
        "train/adversarial.py",
        "return of_energy - log_z_lower",
        "return of_energy + log_z_lower",
        ("train/test_adversarial.py::test_energy_and_generator_have_the_slopes_that_they_should[implicit]",),
    ),
    Mutation(
        "draws of a diffusion's generator without the density of their latents",
        "models/diffusion_ebm.py",
        "jnp.sum(norm.logpdf(z)) + jnp.sum(norm.logpdf(e))",
        "jnp.sum(norm.logpdf(e))",
        ("models/test_diffusion_ebm.py::test_draws_of_any_generator_weigh_the_conditional_without_bias",),
    ),
    Mutation(
        "a diffusion's encoder rewarded for its rate",
        "models/diffusion_ebm.py",
        "*self.given(z, y, level))) - rate",
        "*self.given(z, y, level))) + rate",
        ("models/test_diffusion_ebm.py::test_both_bounds_are_tight_where_the_encoder_is_the_posterior",),
    ),
    Mutation(
        "a diffusion's energy that takes the generator's draws for its own",
        "models/diffusion_ebm.py",
        "jax.nn.softmax(log_weights)",
        "jnp.full_like(log_weights, 1 / self.num_draws)",
        ("models/test_diffusion_ebm.py::test_gradients_are_zero_at_rest_and_that_of_the_likelihood_elsewhere",),
    ),
    Mutation(
        "a diffusion's energy that is trained by the bound of its generator",
        "models/diffusion_ebm.py",
        "fixed.at(sigma).total(drawn)",
        "density.at(sigma).total(drawn)",
        ("models/test_diffusion_ebm.py::test_gradients_are_zero_at_rest_and_that_of_the_likelihood_elsewhere",),
    ),
    Mutation(
        "a diffusion's conditional without the noisy point",
        "models/diffusion_ebm.py",
        "- jnp.sum((y - drawn) ** 2) / (2 * step)",
        "",
        ("models/test_diffusion_ebm.py::test_at_rest_draws_weigh_the_same_and_the_divergence_is_nothing",),
    ),
    Mutation(
        "a diffusion's generator walked upwards",
        "models/diffusion_ebm.py",
        "points, given, reverse=True)",
        "points, given, reverse=False)",
        ("models/test_diffusion_ebm.py::test_the_chain_walked_down_has_the_density_of_the_data",),
    ),
)


def _copy(directory: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ebm_ppl", directory / "ebm_ppl", ignore=ignore)
    shutil.copytree(ROOT / "tests", directory / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", directory)


def _run(directory: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Pytest's exit code and output, with the package of that directory."""
    environment = os.environ | {"PYTHONPATH": str(directory), "PYTHONDONTWRITEBYTECODE": "1"}
    where = [sys.executable, "-c", "import ebm_ppl; print(ebm_ppl.__file__)"]
    found = subprocess.run(where, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if found.returncode == 0 and not Path(found.stdout.strip()).is_relative_to(directory):
        raise SystemExit(f"The tests would import {found.stdout.strip()}, not the copy in {directory}.")
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=line", "-m", "slow or not slow"]
    pytest += ["-p", "no:cacheprovider", *[f"tests/{test}" for test in dict.fromkeys(tests)]]
    result = subprocess.run(pytest, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def _short(test: str) -> str:
    return (
        test.replace(".py::test_", ": ")
        .removeprefix("test_")
        .replace("_agrees_with_weighted_draws_of_the_reference", "")
    )


def check_strings(mutations: list[Mutation]) -> None:
    """Every string is there, and once: otherwise a mutation is out of date, which is an error."""
    problems = []
    for mutation in mutations:
        count = (ROOT / "ebm_ppl" / mutation.file).read_text().count(mutation.old)
        if count != 1:
            problems.append(f"{mutation.name}: {mutation.old!r} occurs {count} times in {mutation.file}")
    if problems:
        raise SystemExit("Mutations out of date:\n  " + "\n  ".join(problems))


def main(words: list[str]) -> int:
    mutations = [mutation for mutation in MUTATIONS if all(word.lower() in mutation.name.lower() for word in words)]
    if not mutations:
        raise SystemExit(f"No mutation's name contains {words}.")
    check_strings(mutations)
    with tempfile.TemporaryDirectory() as scratch:
        sound = Path(scratch) / "sound"
        sound.mkdir()
        _copy(sound)
        code, output = _run(sound, tuple(test for mutation in mutations for test in mutation.tests))
        if code != 0:
            raise SystemExit(f"The aimed tests must pass on the unbroken package first:\n{output[-3000:]}")
        survived = 0
        print(f"{'mutation':60s} | {'aimed test':62s} | {'outcome':8s} | seconds", flush=True)
        for number, mutation in enumerate(mutations):
            broken = Path(scratch) / f"broken_{number}"
            shutil.copytree(sound, broken, ignore=shutil.ignore_patterns("__pycache__"))
            file = broken / "ebm_ppl" / mutation.file
            file.write_text(file.read_text().replace(mutation.old, mutation.new))
            start = time.perf_counter()
            code, output = _run(broken, mutation.tests)
            seconds = time.perf_counter() - start
            if code not in (0, 1):  # neither passed nor failed: no test ran
                raise SystemExit(f"Pytest could not run for {mutation.name!r}:\n{output[-3000:]}")
            survived += code == 0
            outcome = "survived" if code == 0 else "caught"
            print(f"{mutation.name:60s} | {_short(mutation.tests[0]):62s} | {outcome:8s} | {seconds:.0f}", flush=True)
    print(f"{len(mutations) - survived} of {len(mutations)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
