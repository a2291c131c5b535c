"""Two processes of one run on this machine, each with virtual devices of its own."""

import os
import socket
import subprocess
import sys


def start(commands, devices=4):
    """Starts a process for each command; together they are one run.

    Args:
        commands: arguments of Python.
        devices: of each process.

    Returns:
        The processes, whose outputs are pipes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    shared = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    shared |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(len(commands))}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**shared, "JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, command in enumerate(commands)
    ]


def finished(processes, timeout=300):
    """[(exit status, standard output, standard error)] of processes; none is left behind."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *told) for process, told in zip(processes, outputs, strict=True)]


def run(*arguments, devices=4):
    """The standard output of the first of two processes with the same arguments; both succeed."""
    results = finished(start([arguments] * 2, devices))
    for status, *_ in results:
        assert status == 0, "\n".join(told[2][-3000:] for told in results)
    return results[0][1]
