"""Kinds of fields that bodies of the gateway and of the engines share."""

from typing import Annotated, TypeVar

from pydantic import Field

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]  # its first fault is told: a million of them take seconds and gigabytes
