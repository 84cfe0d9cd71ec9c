-- tries: randomness that differs between runs
-- expect: field 'randomseed'
math.randomseed()
