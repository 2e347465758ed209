"""The ingress controller: what runs in the pods of image ingress-nginx/controller."""
