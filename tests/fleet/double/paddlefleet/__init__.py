"""A test double of PaddleFleet: the few classes that paddle_vl_sp.fleet extends, with PaddleFleet's signatures.

It is written from a description of how PaddleFleet behaves, for machines that have none. Nothing else may import it.
"""

IS_DOUBLE = True
