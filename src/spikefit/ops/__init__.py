"""Arithmetic: one folder per operation, each with its meaning (`reference`), its kernels and one door (`op`)."""
