"""Energy-based models in Bayesian modelling: energies in NumPyro models, BlackJAX samplers, ArviZ results."""

from ebm_ppl import xla  # noqa: F401  # first, since it is in time only before the import of BlackJAX
from ebm_ppl.arviz import log_z_to_datatree
from ebm_ppl.compare import compare
from ebm_ppl.distribution import EnergyDistribution, energy_factor
from ebm_ppl.energy import Energy, FunctionEnergy, MLPEnergy, QuadraticEnergy, ScaledEnergy, SumEnergy
from ebm_ppl.evaluate.chains import mode_weights, thinned
from ebm_ppl.evaluate.classification import auroc, calibration
from ebm_ppl.evaluate.evaluate import evaluate
from ebm_ppl.evaluate.frechet import frechet_distance
from ebm_ppl.evaluate.significance import holm
from ebm_ppl.evaluate.stein import stein_test
from ebm_ppl.evaluate.two_sample import classifier_auc, classifier_test, mmd_test
from ebm_ppl.evidence import log_z, log_z_stream, read_log_z
from ebm_ppl.flow import Flow, affine_coupling_flow
from ebm_ppl.flow_distribution import FlowDistribution
from ebm_ppl.independence import Independence
from ebm_ppl.inference import posterior_predictive, prior_predictive, sample
from ebm_ppl.kernels import HMC, MALA, MCLMC, NUTS, Langevin
from ebm_ppl.lattice.energy import BoltzmannEnergy, RBMEnergy, enumerate_log_z, enumerate_states
from ebm_ppl.lattice.gibbs import BlockGibbs, Gibbs, GibbsWithGradients
from ebm_ppl.logz.ais import AIS
from ebm_ppl.logz.bdmc import BDMC
from ebm_ppl.logz.bridge import Bridge
from ebm_ppl.logz.consultation import Consultation
from ebm_ppl.logz.fitted import FittedReference
from ebm_ppl.logz.laplace import Laplace
from ebm_ppl.logz.nested import NestedSampling
from ebm_ppl.logz.path import MBAR, SteppingStone, ThermodynamicIntegration
from ebm_ppl.logz.tempering import ParallelTempering
from ebm_ppl.memory import memory
from ebm_ppl.models.annealed import Annealed
from ebm_ppl.models.bounds import held_out_elpd, log_likelihood_bounds
from ebm_ppl.models.calibrated import Calibrated, CalibratedGuess, Calibration, LinearOperator, restoration
from ebm_ppl.models.critic import LogisticGAN, WassersteinGAN
from ebm_ppl.models.diagnostics import latent_diagnostics
from ebm_ppl.models.diffusion_ebm import AdversarialDiffusion, DenoisingGenerator, denoise
from ebm_ppl.models.flow_fit import FittedFlow, fit_flow_to
from ebm_ppl.models.flow_model import FlowEncoder, FlowModel
from ebm_ppl.models.graph_ebm import GraphEnergy, GraphScores, fit_graph_energy, gnnsafe, logit_energy
from ebm_ppl.models.hierarchical import DiffusionPrior, hierarchical_vae
from ebm_ppl.models.latent import LatentModel
from ebm_ppl.models.likelihood import BernoulliLikelihood, CategoricalLikelihood, GaussianLikelihood
from ebm_ppl.models.tilt import calibrated, tilted, weigh_tilt
from ebm_ppl.models.vae import EvidenceBound, vae
from ebm_ppl.networks import ConvEnergy, ConvNetwork, DeconvNetwork, JointEnergy, SpectralNorm
from ebm_ppl.noise import NoiseConditionalEnergy, noise_levels
from ebm_ppl.numpyro_kernel import as_numpyro_kernel
from ebm_ppl.plots import plot_compare, plot_energies, plot_sequential_evidence, plot_smc
from ebm_ppl.plots_energy import plot_energy_histograms, plot_landscape
from ebm_ppl.plots_models import plot_images, plot_traversal
from ebm_ppl.sequential import evidence_between, sequential_evidence
from ebm_ppl.smc import SMC
from ebm_ppl.target import Target, target
from ebm_ppl.train.adversarial import Adversarial, FlowGenerator, ImplicitGenerator
from ebm_ppl.train.anneal import anneal
from ebm_ppl.train.contrast import EnergyDiscrepancy, NoiseContrast
from ebm_ppl.train.discrete import ConcreteScoreMatching, PseudoLikelihood, RatioMatching
from ebm_ppl.train.fit import fit
from ebm_ppl.train.jarzynski import Jarzynski
from ebm_ppl.train.latent import FittedLatent, fit_latent
from ebm_ppl.train.likelihood import (
    ContrastiveDivergence,
    MaximumLikelihood,
    MonteCarloLikelihood,
    PersistentContrastiveDivergence,
)
from ebm_ppl.train.recovery import RecoveryLikelihood, recover
from ebm_ppl.train.score import DenoisingScoreMatching, ScoreMatching
from ebm_ppl.train.walkers import Dynamics
from ebm_ppl.transport import Transported, transported
from ebm_ppl.typing import (
    CheckpointError,
    DegenerateParticlesError,
    EnergyError,
    EnergyShapeError,
    EnergyWarning,
    IncomparableError,
    IntractablePartitionError,
    LogZ,
    NonFiniteEnergyError,
    NoReferenceError,
    OutOfMemoryError,
    TemperingStalledError,
)

__all__ = [
    "AIS",
    "BDMC",
    "HMC",
    "MALA",
    "MBAR",
    "MCLMC",
    "NUTS",
    "SMC",
    "Adversarial",
    "AdversarialDiffusion",
    "Annealed",
    "BernoulliLikelihood",
    "BlockGibbs",
    "BoltzmannEnergy",
    "Bridge",
    "Calibrated",
    "CalibratedGuess",
    "Calibration",
    "CategoricalLikelihood",
    "CheckpointError",
    "ConcreteScoreMatching",
    "Consultation",
    "ContrastiveDivergence",
    "ConvEnergy",
    "ConvNetwork",
    "DeconvNetwork",
    "DegenerateParticlesError",
    "DenoisingGenerator",
    "DenoisingScoreMatching",
    "DiffusionPrior",
    "Dynamics",
    "Energy",
    "EnergyDiscrepancy",
    "EnergyDistribution",
    "EnergyError",
    "EnergyShapeError",
    "EnergyWarning",
    "EvidenceBound",
    "FittedFlow",
    "FittedLatent",
    "FittedReference",
    "Flow",
    "FlowDistribution",
    "FlowEncoder",
    "FlowGenerator",
    "FlowModel",
    "FunctionEnergy",
    "GaussianLikelihood",
    "Gibbs",
    "GibbsWithGradients",
    "GraphEnergy",
    "GraphScores",
    "ImplicitGenerator",
    "IncomparableError",
    "Independence",
    "IntractablePartitionError",
    "Jarzynski",
    "JointEnergy",
    "Langevin",
    "Laplace",
    "LatentModel",
    "LinearOperator",
    "LogZ",
    "LogisticGAN",
    "MLPEnergy",
    "MaximumLikelihood",
    "MonteCarloLikelihood",
    "NestedSampling",
    "NoReferenceError",
    "NoiseConditionalEnergy",
    "NoiseContrast",
    "NonFiniteEnergyError",
    "OutOfMemoryError",
    "ParallelTempering",
    "PersistentContrastiveDivergence",
    "PseudoLikelihood",
    "QuadraticEnergy",
    "RBMEnergy",
    "RatioMatching",
    "RecoveryLikelihood",
    "ScaledEnergy",
    "ScoreMatching",
    "SpectralNorm",
    "SteppingStone",
    "SumEnergy",
    "Target",
    "TemperingStalledError",
    "ThermodynamicIntegration",
    "Transported",
    "WassersteinGAN",
    "affine_coupling_flow",
    "anneal",
    "as_numpyro_kernel",
    "auroc",
    "calibrated",
    "calibration",
    "classifier_auc",
    "classifier_test",
    "compare",
    "denoise",
    "energy_factor",
    "enumerate_log_z",
    "enumerate_states",
    "evaluate",
    "evidence_between",
    "fit",
    "fit_flow_to",
    "fit_graph_energy",
    "fit_latent",
    "frechet_distance",
    "gnnsafe",
    "held_out_elpd",
    "hierarchical_vae",
    "holm",
    "latent_diagnostics",
    "log_likelihood_bounds",
    "log_z",
    "log_z_stream",
    "log_z_to_datatree",
    "logit_energy",
    "memory",
    "mmd_test",
    "mode_weights",
    "noise_levels",
    "plot_compare",
    "plot_energies",
    "plot_energy_histograms",
    "plot_images",
    "plot_landscape",
    "plot_sequential_evidence",
    "plot_smc",
    "plot_traversal",
    "posterior_predictive",
    "prior_predictive",
    "read_log_z",
    "recover",
    "restoration",
    "sample",
    "sequential_evidence",
    "stein_test",
    "target",
    "thinned",
    "tilted",
    "transported",
    "vae",
    "weigh_tilt",
]
