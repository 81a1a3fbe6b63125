"""The commands that train nothing: show, compare, doctor, debug, plan, fit-aspects."""
