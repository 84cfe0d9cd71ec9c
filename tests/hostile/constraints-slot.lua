-- tries: a pin outside
-- expect: constraints: pins[1].slot: 24 out of 0..23
return {constraints = function() return {pins = {{layer = 1, slot = 24, expert = 0}}} end}
