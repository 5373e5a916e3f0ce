"""Verification against golden files of the official implementation."""
