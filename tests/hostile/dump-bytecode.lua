-- tries: bytecode to tamper with
-- expect: field 'dump'
string.dump(function() end)
