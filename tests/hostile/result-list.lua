-- tries: functions without names
-- expect: a policy has no field 1
return {function() end}
