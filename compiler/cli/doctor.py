"""`planish doctor`: what this machine has, and what it lacks."""

from planish.compiler.cli.app import JsonFlag, Output

__all__ = ["run_doctor"]


def run_doctor(json: JsonFlag = False) -> None:
    """Print versions, the processor's integer instructions, GPUs, disk and missing extras."""
    from planish.compiler.doctor import diagnose

    out, found = Output(json), diagnose()
    cpu = found["cpu"]
    out.rows(
        {
            "python": f"{found['python']} on {found['platform']}",
            **{name: version or "not installed" for name, version in found["packages"].items()},
            "cpu": f"{cpu['cores']} cores, {cpu['threads']} threads; {' '.join(cpu['flags']) or 'no known flags'}",
            "memory": f"{found['memory_gb']} GB",
            "gpu": "; ".join(found["gpus"]) or "none",
            "disk": f"{found['disk_free_gb']} GB free here",
        }
    )
    for sentence in found["advice"]:
        out.line(f"- {sentence}")
    out.result(found)
