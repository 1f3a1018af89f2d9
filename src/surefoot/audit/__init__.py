"""`surefoot audit`: where does a model break?"""

from surefoot.audit.run import Audit, Skipped, all_instruments, audit

__all__ = ["Audit", "Skipped", "all_instruments", "audit"]
