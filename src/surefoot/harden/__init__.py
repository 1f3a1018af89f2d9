"""`surefoot harden`: fix a model with published methods, and measure what the fix did."""

from surefoot.harden.run import Comparison, Hardened, compare, harden

__all__ = ["Comparison", "Hardened", "compare", "harden"]
