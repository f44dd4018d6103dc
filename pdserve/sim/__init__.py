"""The balancer's own policy, admission and load table, run in virtual time against modelled workers."""
