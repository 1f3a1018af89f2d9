"""One self-contained HTML file and its JSON twin for each job."""

from surefoot.report.page import write_audit_report, write_evidence_page, write_harden_report
from surefoot.report.reconstruction import write_reconstruction_report

__all__ = ["write_audit_report", "write_evidence_page", "write_harden_report", "write_reconstruction_report"]
