-- tries: a pin in a layer that does not exist
-- expect: constraints: pins[1].layer: 2 is no MoE layer
return {constraints = function() return {pins = {{layer = 2, slot = 0, expert = 0}}} end}
