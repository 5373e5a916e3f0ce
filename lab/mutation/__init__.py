"""Mutation testing: do the tests notice a bug? python -m lab.mutation"""
