"""Neural activation patterns as specifications: proofs for everything that switches a class's characteristic neurons on and off.

A pattern P of a class names neurons that must be active (pre-activation z > 0) and neurons that must be inactive (z <= 0), before ReLUs.
It is mined from training inputs: with p_j the share of the class's inputs that activate neuron j,

    active if p_j >= delta,    inactive if 1 - p_j >= delta,    else free        0.5 < delta <= 1

A lower delta names more neurons: the region is smaller, fewer inputs follow it, and proofs get easier. Then, for the region
R = {x in the domain, or a ball in it: x follows P}:

    verify_nap         f_c(x) > f_k(x) for all k and all x of R, or an input of R that is classified otherwise
    check_ambiguity    that no input follows the patterns of two classes, or one that does
    max_verified_eps   the largest ball around an input in which, within P, the class provably stays
    nap_coverage       recall, spill and precision of the patterns on inputs they were not mined from

A constrained neuron is linear and costs no branch; bounds go first, then the LP, then the MILP for what remains open. A region
without inputs is reported as such, never as verified. Sampling inputs that follow P proves nothing and is not done here.

Source: Geng, Le, Xu, Wang, Gurfinkel & Si, "Towards Reliable Neural Specifications", ICML 2023, arXiv 2210.16114.
"""

from surefoot.certified.nap.instrument import NeuralSpecification
from surefoot.certified.nap.patterns import (
    ActivationPattern,
    NAPCoverage,
    instance_pattern,
    mine_naps,
    nap_coverage,
    neuron_values,
)
from surefoot.certified.nap.verification import (
    Ambiguity,
    NAPVerification,
    VerifiedEps,
    check_ambiguity,
    max_verified_eps,
    verify_nap,
    verify_pairs,
)

__all__ = [
    "ActivationPattern",
    "Ambiguity",
    "NAPCoverage",
    "NAPVerification",
    "NeuralSpecification",
    "VerifiedEps",
    "check_ambiguity",
    "instance_pattern",
    "max_verified_eps",
    "mine_naps",
    "nap_coverage",
    "neuron_values",
    "verify_nap",
    "verify_pairs",
]
