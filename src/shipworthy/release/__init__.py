"""From files to a registered release: pin, scan, register, verify, probe and report.

`create` turns a spec and a folder into a release, `verify` reads every byte of one again, `probes`
observe the checklist items that can be known before traffic, and `report` writes the page.
"""
