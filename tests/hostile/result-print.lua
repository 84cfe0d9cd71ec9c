-- tries: print as a policy's function
-- expect: replicate: it returned nothing
return {replicate = print}
