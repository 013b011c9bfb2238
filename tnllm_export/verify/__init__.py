"""Parity is the product: any runtime against the eager model."""

from tnllm_export.verify.bundle import check_savable, save_report, verify_bundle
from tnllm_export.verify.parity import Workload, verify_runtime
from tnllm_export.verify.records import ParityReport

__all__ = ["ParityReport", "Workload", "check_savable", "save_report", "verify_bundle", "verify_runtime"]
