"""Would the tests notice a bug? python -m lab.mutation"""
