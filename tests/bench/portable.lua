-- Separate launches on every target: what plan constants gain is measured on kernels that can do
-- without them.
return {
  name = "portable",
  variant = function(model, cluster, regime) return { experts = false } end,
}
