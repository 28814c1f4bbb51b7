"""The device that a tool times: the GPU, or the emulated one to try the tool itself."""

from __future__ import annotations

import argparse

from engine.backends.cuda.cupy_device import CupyDevice
from engine.backends.cuda.device import Device


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add --device and --quick."""
    parser.add_argument("--device", choices=["gpu", "emulated"], default="gpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the tool")


def device_of(options: argparse.Namespace) -> Device:
    """The device that --device names."""
    if options.device == "gpu":
        return CupyDevice()
    from tests.support.cuda_emulator.device import EmulatedDevice

    return EmulatedDevice()
