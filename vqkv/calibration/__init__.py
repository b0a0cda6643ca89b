"""Calibration: capturing a model's states on text, and fitting a compressor to them."""

from vqkv.calibration.capture import Kind, StateCapture
from vqkv.calibration.run import CalibrationReport, calibrate, peak_rss_bytes
from vqkv.calibration.spool import Spool
from vqkv.calibration.spooling import Progress, capture, wanted_by_all
from vqkv.calibration.windows import (
    Text,
    calibration_windows,
    check_context,
    read_text,
    text_windows,
)

__all__ = [
    "CalibrationReport",
    "Kind",
    "Progress",
    "Spool",
    "StateCapture",
    "Text",
    "calibrate",
    "calibration_windows",
    "capture",
    "check_context",
    "peak_rss_bytes",
    "read_text",
    "text_windows",
    "wanted_by_all",
]
