"""What checks the types in signatures in the second run of the unit tests (Makefile):
as beartype does, where a whole number is also a float, as type checkers read it.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
