"""Checks of a constructor's arguments, so that all faults are named together."""


def find_wrong_sizes(least: int = 1, **sizes) -> list[str]:
    """Those that are not whole numbers of at least `least`, a line each."""
    return [
        f"{name} must be a whole number of at least {least}, got {size!r}"
        for name, size in sizes.items()
        if not isinstance(size, int) or isinstance(size, bool) or size < least
    ]


def find_wrong_choices(choices: tuple, **values) -> list[str]:
    """Those that are none of the choices, a line each; 1 is not True."""
    return [
        f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}"
        for name, value in values.items()
        if not any(type(value) is type(choice) and value == choice for choice in choices)
    ]
