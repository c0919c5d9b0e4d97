"""Planning: the one harness for bytes, operations, energy and rates."""


