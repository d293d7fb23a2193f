"""ffmpeg and ffprobe, as programs."""

import shutil
import subprocess

from local.tools.command_line import UserError


def need_ffmpeg() -> None:
    """Raises a UserError where ffmpeg or ffprobe is not on the PATH."""
    missing = [program for program in ("ffmpeg", "ffprobe") if shutil.which(program) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not found on the PATH; install ffmpeg"
            " (Debian, Ubuntu: sudo apt-get install ffmpeg)"
        )


def run_program(program: str, *args: str) -> subprocess.CompletedProcess:
    result = subprocess.run([program, "-loglevel", "error", *args], capture_output=True)
    if result.returncode != 0:
        raise UserError(f"{program} cannot read it: {last_line(result.stderr)}")
    return result


def last_line(output: bytes) -> str:
    """Or nothing, where there is none."""
    return (output.decode(errors="replace").strip().splitlines() or [""])[-1]
