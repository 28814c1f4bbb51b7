"""The build backend of pip: scikit-build-core's, once it is known that the kernels can be built.

pip shows all that a failed build has printed; so what can't work ends here, with one line.
"""

import os
import platform
import shutil
import sys

COMPILERS = ("g++", "c++", "clang++")


def find_compiler() -> str:
    """The command of the C++ compiler. Exits where there is none, or where kernels can't run."""
    if sys.platform != "linux":
        sys.exit(f"gdn-engine: expected Linux (on Windows: WSL), got {platform.system()}")
    given = os.environ.get("CXX", "").strip()
    commands = [given] if given else COMPILERS
    for command in commands:
        if shutil.which(command.split()[0]):
            return command
    of = "CXX" if given else "PATH"
    sys.exit(f"gdn-engine: expected a C++17 compiler, found no {' or '.join(commands)} ({of}): "
             "apt-get install g++")  # fmt: skip


# Without it, scikit-build-core takes the compiler that this Python was built with.
os.environ["CXX"] = find_compiler()

from scikit_build_core.build import *  # noqa: E402, F403
