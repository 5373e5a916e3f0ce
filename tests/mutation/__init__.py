"""Would the tests notice a bug? python -m tests.mutation"""
