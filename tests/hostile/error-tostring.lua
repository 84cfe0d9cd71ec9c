-- tries: an error whose text does not end
-- expect: error() was given a table
error(setmetatable({}, {__tostring = function() while true do end end}))
