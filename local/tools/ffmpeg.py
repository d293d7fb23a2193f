"""Run ffmpeg and ffprobe as programs."""

import shutil
import subprocess

from local.tools.command_line import UserError


def need_ffmpeg() -> None:
    """Raise a UserError where ffmpeg or ffprobe is not on the PATH."""
    missing = [program for program in ("ffmpeg", "ffprobe") if shutil.which(program) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not found on the PATH; install ffmpeg"
            " (Debian, Ubuntu: sudo apt-get install ffmpeg)"
        )


def run_program(program: str, *args: str) -> subprocess.CompletedProcess:
    """Run ffmpeg or ffprobe, capturing stdout and stderr as bytes.

    Raises:
        UserError: it fails.
    """
    result = subprocess.run([program, "-loglevel", "error", *args], capture_output=True)
    if result.returncode != 0:
        raise UserError(f"{program} cannot read it: {last_line(result.stderr)}")
    return result


def list_encoders() -> set[str]:
    """Return the names of the encoders that ffmpeg has."""
    command = ["ffmpeg", "-hide_banner", "-encoders"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    return {line.split()[1] for line in listed.splitlines() if len(line.split()) > 1}


def last_line(output: bytes) -> str:
    """Return the last line of a program's output; "" where there is none."""
    return (output.decode(errors="replace").strip().splitlines() or [""])[-1]
