"""The rollout over four processes, each with a device of its own, is the rollout on one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("one_of_many_processes.py")


def test_four_processes_are_as_one_device():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, coordinator, "4", str(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(4)
    ]
    outs = [process.communicate(timeout=300)[0] for process in processes]
    assert [out.splitlines()[-1] for out in outs] == ["as one device"] * 4, outs
