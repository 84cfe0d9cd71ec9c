-- robust: nothing is defined here, so the built-in planner decides everything. One workload is
-- optimised exactly; several are normalised and weigh the same.
return {name = "robust"}
