"""`surefoot harden`: fix a model with published methods, and measure what the fix did."""

from surefoot.harden.run import Comparison, Hardened, check_hardenable, compare, harden

__all__ = ["Comparison", "Hardened", "check_hardenable", "compare", "harden"]
