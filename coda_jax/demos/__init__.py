"""`make demo` and its kin: a bundled checkpoint adapted several ways, evaluated, timed, drawn."""
