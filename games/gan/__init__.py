"""Generators and discriminators as leaders and followers."""
