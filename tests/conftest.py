"""Settings that every test shares."""

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # a slow moment of the machine is not a defect
settings.load_profile("shared machine")
